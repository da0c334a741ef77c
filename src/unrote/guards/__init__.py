"""Guards: what is done while sampling so that a model that is already trained gives no training images back.

:mod:`copy_filter` checks finished images and makes copies again; :mod:`guidance` leads the denoising away from training
images; :mod:`prompts` and :mod:`embeddings` loosen the text. ``unrote sample --guard`` reads them from a line of text
(:mod:`spec`); each also works on a plain diffusers pipeline, see docs/guards.md.
"""
