"""vLLM's multimodal models without torchvision, which this environment leaves out.

transformers has image processors on PIL alone, but the modules of these models import torchvision for
the ones on torchvision, and vLLM imports them with theirs. Here they are imported over an empty
stand-in, which is gone afterwards; what then runs is vLLM's and transformers' own code, with the
processors on PIL.
Video goes through torchvision alone, so it cannot be tried.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

MODELS = ("llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "gemma3_mm")
"""vLLM's modules."""

PLUGIN = "duo_test_vision"


@contextmanager
def _stand_in():
    """An empty torchvision that can be imported from, and that transformers holds to be absent."""
    from transformers.utils.import_utils import is_torchvision_available

    # Asked once, then remembered.
    assert not is_torchvision_available(), "these tests are for the environment of `make setup`"
    parts = ["torchvision", "transforms", "v2", "functional"]
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    modules = [ModuleType(name) for name in names]
    for module, inner, name in zip(modules, modules[1:], parts[1:], strict=False):
        setattr(module, name, inner)
    for module, name in zip(modules, names, strict=True):
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules.update(zip(names, modules, strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _from_parts(images: type, **others):
    """A processor's ``from_pretrained`` that loads its image processor on PIL and its tokenizer."""
    from transformers import AutoTokenizer

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(images.from_pretrained(folder), tokenizer, **others)

    return from_pretrained


@functools.cache
def import_models() -> None:
    """Import vLLM's modules over the stand-in, and let their processors be made without torchvision."""
    import transformers
    import transformers.models.pixtral
    from transformers.processing_utils import VideosKwargs

    with _stand_in():
        pixtral = importlib.import_module("transformers.models.pixtral.processing_pixtral")
        transformers.models.pixtral.PixtralProcessor = pixtral.PixtralProcessor
        for name in MODELS:
            importlib.import_module(f"vllm.model_executor.models.{name}")
    pixtral.PixtralProcessor.from_pretrained = _from_parts(
        transformers.PixtralImageProcessorPil, patch_size=8, spatial_merge_size=2
    )
    # transformers' own cannot be made without torchvision; nothing but its settings is asked for.
    video = SimpleNamespace(valid_kwargs=VideosKwargs, merge_size=2)
    for processor in (transformers.Qwen2VLProcessor, transformers.Qwen2_5_VLProcessor):
        processor.check_argument_for_proper_class = lambda *args: None
        processor.from_pretrained = _from_parts(
            transformers.Qwen2VLImageProcessorPil, video_processor=video
        )


def write_plugin(folder: Path) -> Path:
    """A distribution with a plugin of vLLM's: where it is on the path, ``import_models`` is called."""
    info = folder / f"{PLUGIN}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{PLUGIN} = {__name__}:import_models\n"
    )
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Lets vLLM look at and load the models, in this process and in further ranks."""
    from vllm.model_executor.models import registry

    import_models()
    with pytest.MonkeyPatch.context() as patch:
        # Ranks are spawned, with the path of this process.
        patch.syspath_prepend(write_plugin(tmp_path_factory.mktemp("vision")))
        # vLLM looks at a model's class in another process, which has no stand-in.
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield
