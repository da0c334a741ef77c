"""What the package offers, what importing it costs, and that imports point one way."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import import_module, resources
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import unrote

PROJECT = Path(__file__).parents[1]
ROOT = Path(str(resources.files("unrote")))
MODULES = sorted(ROOT.rglob("*.py"))


def test_all_is_exactly_what_can_be_imported():
    assert sorted(unrote.__all__) == sorted(unrote._HOMES) == dir(unrote)
    namespace = {}
    exec("from unrote import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == sorted(unrote.__all__)
    for name in unrote.__all__:
        value = getattr(unrote, name)
        assert value.__name__ == name
        assert value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = unrote.nothing


def test_the_type_checker_is_told_of_the_same_names():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == unrote._HOMES


def test_no_submodule_hides_a_public_name():
    """Importing a submodule sets it as an attribute of the package: it must not be called as a public function is."""
    assert not {path.stem for path in ROOT.iterdir()} & set(unrote.__all__)


def test_it_is_typed_and_has_a_version():
    assert (ROOT / "py.typed").is_file()
    assert unrote.__version__.count(".") == 2


HEAVY = {"torch", "diffusers", "datasets", "PIL", "pydantic", "numpy", "transformers"}


def loaded_by(code):
    probe = f"import sys; sys.argv = ['unrote', '--help']\n{code}\nprint('LOADED', *sys.modules)"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import unrote; dir(unrote); unrote.__version__", HEAVY),
        ("from unrote.cli import main\ntry: main()\nexcept SystemExit: pass", HEAVY - {"pydantic"}),
        ("import unrote.config", {"torch", "diffusers"}),
        ("import unrote.data", {"torch", "datasets", "diffusers"}),
        ("import unrote.measures", {"diffusers", "transformers", "scipy"}),
    ],
)
def test_importing_loads_nothing_heavy(code, heavy):
    assert not loaded_by(code) & heavy


def imports_of(path):
    """Modules that a file imports at run time, wherever in it, by full name."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "unrote"}
    return found


def own_imports(folder):
    return {
        (str(path.relative_to(ROOT)), name)
        for path in MODULES
        if path.is_relative_to(ROOT / folder)
        for name in imports_of(path)
        if name.split(".")[0] == "unrote"
    }


def test_the_method_knows_only_torch_and_indices():
    for path in (ROOT / "method").glob("*.py"):
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top in {"torch", "numpy", *sys.stdlib_module_names, "unrote"}, f"{path.name} imports {name}"
    for path, name in own_imports("method"):
        assert name.split(".")[1] in {"method", "seeding", "tensorfiles"}, f"{path} imports {name}"


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("auditing", {"training", "method", "models", "cli", "config", "sampling", "demo"}),
        (
            "neighbours",
            {"training", "method", "models", "cli", "config", "sampling", "demo", "auditing", "report", "scanning"},
        ),
        ("encoders", {"training", "method", "models", "cli", "sampling", "demo", "auditing", "report", "scanning"}),
        ("scanning", {"training", "method", "models", "cli", "config", "sampling", "demo"}),
        ("report", {"training", "method", "models", "cli", "config", "sampling", "demo"}),
        ("data", {"training", "method", "models", "cli", "auditing", "report", "sampling", "config", "demo"}),
        ("models", {"training", "method", "cli", "auditing", "report", "sampling", "demo"}),
        ("training", {"cli", "auditing", "report", "demo", "api"}),
        ("files.py", {"training", "method", "models", "cli", "auditing", "report", "data", "config"}),
        ("tensorfiles.py", {"training", "method", "models", "cli", "auditing", "report", "data", "config"}),
        ("config", {"training", "method", "models", "cli", "auditing", "report", "data"}),
    ],
)
def test_imports_point_one_way(folder, never):
    wrong = [(path, name) for path, name in own_imports(folder) if (name + ".").split(".")[1] in never]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_and_can_be_imported(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))
    if path.name != "__main__.py":
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


MODULES_THAT_RUN = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "torch.jit"}
NAMES_THAT_RUN = {"eval", "exec", "compile", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.full_load"}
METHODS_THAT_RUN = {
    *("FeatureExtractorInceptionV3", "from_single_file", "unsafe_load", "read_pickle", "extractall", "unpack_archive"),
    *("load_lora_weights", "load_attn_procs", "load_ip_adapter", "load_textual_inversion", "send_object_list"),
    *("recv_object_list", "broadcast_object_list", "scatter_object_list", "all_gather_object", "gather_object"),
}
SAFE = {  # what each call that may unpickle is told so that it doesn't; the longest ending that fits
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
    "Scheduler.from_pretrained": "",  # JSON
    "AutoModel.from_pretrained": "weights_only=True, trust_remote_code=False",
    "AutoTokenizer.from_pretrained": "trust_remote_code=False",
    "processor.from_pretrained": "trust_remote_code=False",
    "from_pretrained": "use_safetensors=True",
    "load_lora_adapter": "use_safetensors=True",
}
ALLOWED = {  # SECURITY.md and docs/encoders.md say the first two
    ("encoders/weights.py", "torch.jit.load"): "a program of a file that the user names as an encoder",
    ("encoders/inception.py", "FeatureExtractorInceptionV3"): "unpickles the one file that is known by its SHA-256",
    ("models/pretrained.py", "from_single_file"): "check_source lets .safetensors through only",
}


def dangers_of(source):
    """Line and name of whatever a piece of Python has that can unpickle or run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from ((node.lineno, name) for name in modules if {name, name.split(".")[0]} & MODULES_THAT_RUN)
        # Not only where it is called: it may be called by another name.
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = ast.unparse(node)
            if name in NAMES_THAT_RUN or (name := name.rpartition(".")[2]) in METHODS_THAT_RUN:
                yield node.lineno, name
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            rule = max((one for one in SAFE if name.endswith(one)), key=len, default=None)
            told = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords}
            if rule and not set(filter(None, SAFE[rule].split(", "))) <= told:
                yield node.lineno, name


def test_nothing_is_ever_unpickled():
    """A file from a stranger must not run code: safetensors, arrays without objects, and what is allowed by name.

    Of imports too, as processes of a group that send each other objects unpickle them.
    """
    found = [
        (path.relative_to(ROOT).as_posix(), line, name)
        for path in MODULES
        for line, name in dangers_of(path.read_text("utf-8"))
    ]
    assert [one for one in found if (one[0], one[2]) not in ALLOWED] == []
    assert {(path, name) for path, _, name in found} == set(ALLOWED), "nothing is allowed that is not there"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "load = torch.jit.load",
        "UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)",
        "pipeline.from_pretrained(folder, **options)",
        "AutoModel.from_pretrained(folder, weights_only=True)",
        "pipeline.from_single_file(file)",
        "yaml.load(text)",
        "exec(text)",
        "eval(text)",
        "unet.load_lora_adapter(folder)",
    ],
)
def test_the_search_for_dangers_finds_them(source):
    assert len(list(dangers_of(source))) == 1


def test_evaluation_mode_and_regular_expressions_are_no_danger():
    assert list(dangers_of("model.eval(); re.compile(text); DDPMScheduler.from_pretrained(folder)")) == []


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Names in the wheel and in the source archive, as hatchling builds them from this tree."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file, tarfile.open(source) as tar:
        metadata = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        top = f"unrote-{unrote.__version__}/"
        packed = {name.removeprefix(top) for name in tar.getnames()}
        return set(file.namelist()), packed, Parser().parsestr(file.read(metadata).decode())


def test_the_wheel_has_all_of_the_package_and_nothing_else(archives):
    wheel, source, metadata = archives
    tracked = {path.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    tracked = {name for name in tracked if "__pycache__" not in name}
    assert {name for name in wheel if ".dist-info/" not in name} == tracked
    assert {"unrote/py.typed", "unrote/presets/small-data.yaml", "unrote/data/assets/emoji.npz"} <= wheel
    assert metadata["Version"] == unrote.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert {"README.md", "LICENSE", "src/unrote/cli.py", "tests/test_package.py"} <= source


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="is itself unpacked from a source archive")
def test_the_source_archive_has_all_that_is_tracked_and_nothing_that_is_ignored(archives):
    """So its tests, which read docs, examples and benchmarks, run."""
    _, source, _ = archives

    def listed(*options):
        done = subprocess.run(["git", "ls-files", *options], cwd=PROJECT, check=True, capture_output=True, text=True)
        return set(done.stdout.splitlines())

    tracked, ignored = listed("--cached"), listed("--others", "--ignored", "--exclude-standard")
    assert tracked <= source
    assert not source & ignored


def test_extras_are_there_and_name_only_each_other(archives):
    *_, metadata = archives
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"text", "sscd", "fid", "track", "docs", "dev", "hf"} <= extras
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.name == "unrote":
            assert requirement.extras <= extras
        assert requirement.name != "torchvision", "its wheel does not import beside PyTorch for CPUs"


def test_the_citation_is_of_this_package():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text("utf-8"))
    assert (citation["cff-version"], citation["title"], citation["license"]) == ("1.2.0", "unrote", "Apache-2.0")
    assert citation["version"] == unrote.__version__
    assert [str(row["identifiers"][0]["value"]) for row in citation["references"]] == [
        "arXiv:2407.15328",
        "arXiv:2502.09434",
    ]


def test_issue_forms_ask_for_the_environment():
    forms = sorted((PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "idea", "measurement"]
    for form in forms:
        values = yaml.safe_load(form.read_text("utf-8"))
        if form.stem in ("bug", "measurement"):
            assert "unrote env" in str(values["body"])
