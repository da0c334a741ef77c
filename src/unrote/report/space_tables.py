"""The page's part on feature spaces: similarity, quality next to memorization, and the secondary measures."""

from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from unrote.auditing.verdict import interval, percent
from unrote.report.charts import Series, histogram_chart, similarity_axis
from unrote.report.tables import Summary, measured, number, table, with_interval

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

QUALITY = {
    "frechet_distance": ("Fréchet distance", "lower is better; real training images score the column beside"),
    "kid": ("KID", "lower is better; unbiased, so it may be slightly negative"),
    "mifid": ("MiFID", "the Fréchet distance, raised for images too near to the training set"),
    "precision": ("Precision", "share of generated images that lie among real ones"),
    "recall": ("Recall", "share of real images that lie among generated ones"),
    "density": ("Density", "how densely real images surround the generated ones; real ones: about 1"),
    "coverage": ("Coverage", "share of real images with a generated one near"),
}
"""Names of the metrics, and what they say in one line."""

SECONDARY = {
    "authpct": (
        "AuthPct",
        "share of generated images that are <em>not</em> nearer to their nearest training image than that image is to "
        "any other training image; low means copying (Alaa et al. 2022)",
    ),
    "unseen": ("AuthPct of held-out images", "what real images that were not trained on score in their place"),
    "c_t": (
        "C<sub>T</sub>",
        "below 0: generated images lie nearer to training images than held-out ones do, which is copying (clear below "
        "−3); above 0: farther (Meehan et al. 2020)",
    ),
    "fld_gap": (
        "FLD generalization gap",
        "feature likelihood divergence to training images minus to held-out ones (Jiralerspong et al. 2023); below 0: "
        "training images are likelier, also a little without any copying",
    ),
    "fld_excess": (
        "… beyond what needs no copying",
        "the gap minus the same with train and held-out swapped; about 0 for a model that favours neither, clearly "
        "below 0 if it copies",
    ),
}


def similarity_part(report: "AuditReport") -> str:
    """HTML of the similarity in every space where it means copies; empty without such a space."""
    parts = []
    for key, space in report.summary["spaces"].items():
        if space["similarity"] is not None:
            title = f"<h4>{escape(space['encoder'])}</h4>"
            parts.append(
                f"{title}{_similarity_table(space)}{_calibrated(space)}{_similarity_chart(report, key, space)}"
            )
    if not parts:
        return ""
    intro = (
        "Cosine similarity of copy-detection features to the most similar training image: it sees crops, scaling and "
        "colour changes that pixels do not. Beside it what needs no copying: training images to the most similar "
        "<em>other</em> training image, and held-out images to training images."
    )
    return f"<h3>Similarity</h3><p>{intro}</p>{''.join(parts)}"


def _similarity_table(space: Summary) -> str:
    similarity = space["similarity"]
    heads = {"generated": "generated", "background": "training images, to each other", "unseen": "held-out images"}
    sides = {key: words for key, words in heads.items() if similarity.get(key) is not None}
    rows = [_line("mean", [measured(similarity[side]["mean"]) for side in sides])]
    for quantile in similarity["generated"]["quantiles"]:
        words = {"0.5": "median", "1": "highest"}.get(quantile, f"{100 * float(quantile):g} % are below")
        rows.append(_line(words, [number(similarity[side]["quantiles"][quantile]) for side in sides]))
    for position, row in enumerate(similarity["generated"]["above"]):
        cells = [with_interval(similarity[side]["above"][position]) for side in sides]
        rows.append(_line(f"above {row['threshold']:g}", cells))
    head = "".join(f'<th scope="col">{words}</th>' for words in sides.values())
    return table(f"<tr><td></td>{head}</tr>", "".join(rows))


def _calibrated(space: Summary) -> str:
    calibrated = space["similarity"]["calibrated"]
    usual = (
        "0.5 and 0.75 are the thresholds of the literature, chosen for large photos; on small images unrelated "
        "pictures can exceed them and copies can miss them."
    )
    if calibrated is None:
        return f'<p class="soft small">{usual} With held-out images the report derives a threshold from them.</p>'
    above = calibrated["above"]
    return (
        f"<p><b>Calibrated on the held-out images:</b> {percent(calibrated['false_positive_rate'])} of "
        f"{calibrated['num_holdout']:,} of them that duplicate no training image are above "
        f"{calibrated['threshold']:.3f}, and so are {percent(calibrated['unseen']['fraction'])} of all of them, and "
        f"{percent(above['fraction'])} ({interval(above)}) of the generated images, near {above['distinct']:,} "
        "distinct training images.</p>"
        f'<p class="soft small">{usual}</p>'
    )


def _similarity_chart(report: "AuditReport", key: str, space: Summary) -> str:
    values = report.pairs.get(f"{key}_similarity")
    if values is None:
        return ""
    calibrated = space["similarity"]["calibrated"]
    threshold = calibrated["threshold"] if calibrated else 0.5
    above = f"{percent(calibrated['false_positive_rate'])} of held-out above" if calibrated else "0.5"
    label = f"Histogram of similarities, {report.name}, {space['encoder']}"
    series = [Series("generated → most similar training image", values, "c0")]
    for role, words in (("unseen", "held-out → most similar"), ("background", "training → most similar other")):
        control = report.curves.get((key, "similarity", role))
        if control is not None:
            series.append(Series(words, control, "control" if role == "unseen" else "c2", dashed=role == "unseen"))
    return histogram_chart(series, similarity_axis(threshold, above), label=label)


def quality_part(summary: Summary) -> str:
    """HTML of quality in every feature space, the headline space first, and of the CLIP score if there is one."""
    headline = summary["quality_space"]
    spaces = summary["spaces"]
    parts = [_quality_table(spaces[headline])]
    for key, space in spaces.items():
        if key != headline:
            words = f"Quality by {escape(space['encoder'])}"
            parts.append(f"<details><summary>{words}</summary>{_quality_table(space)}</details>")
    return (
        f'<h3>Quality, next to memorization</h3>{parts[0]}<p class="soft small">A model that returns its training '
        "images scores well here: read it beside the near-copies. Compare these numbers only with those of the same "
        f"features, reference and counts.</p>{''.join(parts[1:])}{_clip_score(summary.get('clip_score'))}"
    )


def frechet_name(space: Summary) -> str:
    """``FID`` only for the FID Inception's features."""
    return "FID" if space["is_fid_inception"] else "Fréchet distance"


def _quality_table(space: Summary) -> str:
    quality = space["quality"]
    sides = {"generated": quality["generated"]}
    if quality["floor"] is not None:
        sides["training images themselves"] = quality["floor"]
    rows = []
    for metric in quality["generated"]:
        label, words = QUALITY.get(metric, (metric, ""))
        if metric == "frechet_distance":
            label = frechet_name(space)
        rows.append(_line(label, [measured(side.get(metric)) for side in sides.values()], words))
    head = "".join(f'<th scope="col">{name}</th>' for name in sides)
    kind = "held-out" if quality["reference"] == "holdout" else "training"
    note = "" if space["is_fid_inception"] else " Not an FID."
    text = (
        f"Features {space['encoder']} (weights {space['weights_sha256'][:12]}); {quality['num_generated']:,} images "
        f"against {quality['num_reference']:,} {kind} images, with 95 % intervals.{note}"
    )
    explained = "<th scope='col' class='words'>what it says</th>"
    return table(f"<tr><td></td>{head}{explained}</tr>", "".join(rows)) + f'<p class="soft small">{escape(text)}</p>'


def _clip_score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    return (
        f"<p><b>CLIP score</b> {measured(score)}: how well images and prompts agree, higher is better "
        f"({escape(str(score['model']) or 'default')}, {score['num']:,} images). Compare it only for the same "
        "model.</p>"
    )


def secondary_part(summary: Summary) -> str:
    """HTML of authenticity, C_T and FLD, one column for each space."""
    spaces = summary["spaces"]
    rows = []
    for metric, (label, words) in SECONDARY.items():
        cells = [_secondary_cell(space, metric) for space in spaces.values()]
        if any(cell != "–" for cell in cells):
            rows.append(_line(label, cells, words))
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(space["encoder"])}</th>' for space in spaces.values())
    explained = "<th scope='col' class='words'>what it says</th>"
    return (
        "<h3>Other signs of copying, by feature space</h3><p>These look at features, not at pixels; they support the "
        "verdict or warn, they do not decide it.</p>" + table(f"<tr><td></td>{head}{explained}</tr>", "".join(rows))
    )


def _secondary_cell(space: Summary, metric: str) -> str:
    found: Mapping[str, Callable[[], Any]] = {
        "unseen": lambda: space["authenticity"]["unseen"],
        "authpct": lambda: space["authenticity"]["authpct"],
        "c_t": lambda: space["generalization"]["c_t"],
        "fld_gap": lambda: space["generalization"]["fld"]["gap"],
        "fld_excess": lambda: space["generalization"]["fld"]["excess"],
    }
    try:
        value = found[metric]()
    except (KeyError, TypeError):  # not measured: without held-out images, or with too few
        return "–"
    if isinstance(value, Mapping):
        return with_interval(value) if "fraction" in value else measured(value)
    return "–" if value is None else number(value)


def _line(label: str, cells: list[str], words: str | None = None) -> str:
    explained = "" if words is None else f'<td class="words">{words}</td>'
    return f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}{explained}</tr>'
