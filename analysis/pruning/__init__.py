"""Pruning methods: visual tokens -> one Selection per image. One flat file per method, named once, in `PRUNERS`.

A method selects tokens and fixes the order it emits them in; IDs are given later, by `analysis.positions`. Its file has
prune(visual, keep, *, seeds, **options), and where the method ranks single tokens score(visual, *, seeds, **options).
One that drops tokens inside the decoder has stages(visual, depth, keep, **options) instead (`pruning.inside`).

A specification is name[:option=value[,option=value]], as in "trim:anchor=last"; the options of a method are the
keywords of its function that have defaults. "path/to/file.py:function[:options]" names a method outside this package.
Every method that only selects has the option "inside" besides: "random:inside=2" drops its tokens not before the
decoder, but before the decoder's layer 2 (counted from 0).

This module imports no method before it is asked for, so that what only needs their names and labels stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from analysis.pruning._budget import budget
from analysis.registry import pick

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.types import Selection, VisualTokens

__all__ = ["PRUNERS", "Method", "Pruner", "all_pruners", "budget", "pruner"]

# prune(visual: VisualTokens, keep: float | None, *, seeds: Sequence[int], **options) -> one Selection per image.
# keep: share of the tokens that the decoder still reads, synthetic ones included; None: the method decides itself.
# seeds: one int per image, so that a result does not depend on how images are batched.
Pruner = Callable[..., "list[Selection]"]
INSIDE = "stages"  # the function of a method that drops tokens inside the decoder


def _options(function: Callable) -> dict[str, Any]:
    """Keywords of a method's function or a `score` that a specification may set."""
    known = signature(function).parameters.values()
    return {p.name: p for p in known if p.kind is p.KEYWORD_ONLY and p.name != "seeds"}


def _of_file(path: str) -> Any:
    """The module of a .py file, run anew where the file has changed. Raises ValueError where it cannot be run."""
    return _run_file(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _run_file(path: str, changed: int) -> Any:
    spec = spec_from_file_location(Path(path).stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Method:
    """A pruning method with some of its options set; called, it prunes before the decoder.

    label: its name in figures and tables; module: its module in this package, or the path of a .py file; options: by
    name; function: what prunes in that module; upstream: the IDs that its authors' public code gives, as a
    specification (analysis/upstream_ids.csv says where they were read), None where there is no such code;
    truth: whether it reads the ground truth, and so is no method; layer: the decoder's first layer that reads only what
    is kept.
    """

    label: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    function: str = "prune"
    upstream: str | None = None
    truth: bool = False
    layer: int = 0

    def _module(self) -> Any:
        return _of_file(self.module) if self.module.endswith(".py") else import_module(f"{__name__}.{self.module}")

    @property
    def prune(self) -> Pruner:
        return getattr(self._module(), self.function)

    @property
    def inside(self) -> bool:
        """Whether it drops tokens inside the decoder."""
        return self.function == INSIDE or self.layer > 0

    def __call__(
        self, visual: VisualTokens, keep: float | None, *, seeds: Sequence[int] = (), **options: Any
    ) -> list[Selection]:
        if self.inside:
            raise ValueError(
                f"{self.label} drops tokens inside the decoder, which only `evaluate` and `pruned` do; here a method "
                "is needed that prunes before it"
            )
        return self.prune(visual, keep, seeds=seeds, **{**self.options, **options})

    @property
    def score(self) -> Callable[[VisualTokens, Sequence[int]], Tensor] | None:
        """The score [B, N] by which the method ranks tokens, (visual, seeds) -> higher is kept first.

        None where it has none, or where an option is set that the score does not know: then more than it decides.
        """
        score = getattr(self._module(), "score", None) if self.function == "prune" else None
        options = {name: value for name, value in self.options.items() if name != "emit"}  # which ranks nothing
        if score is None or not options.keys() <= _options(score).keys():
            return None
        return lambda visual, seeds: score(visual, seeds=seeds, **options)


# The names of methods, in the order of tables. "all" in a grid stands for all but the first and what reads the truth.
PRUNERS: dict[str, Method] = {
    "none": Method("none", "none"),
    "random": Method("random", "random"),
    "spatial": Method("spatial grid", "spatial"),
    "cls_similarity": Method("[CLS] similarity", "cls_similarity"),
    "text_similarity": Method("text similarity", "text_similarity"),
    "prumerge": Method("PruMerge", "prumerge", upstream="compact"),
    "prumerge+": Method("PruMerge+", "prumerge", {"plus": True}, upstream="compact"),
    "trim": Method("TRIM", "trim", upstream="compact"),
    "trim:lowest=false": Method("TRIM, sign turned", "trim", {"lowest": False}),
    "fastervlm": Method("FasterVLM", "fastervlm", upstream="compact"),
    "divprune": Method("DivPrune", "divprune", upstream="compact"),
    "visionzip": Method("VisionZip", "visionzip", upstream="compact"),
    "vispruner": Method("VisPruner", "vispruner", upstream="compact"),
    "cdpruner": Method("CDPruner", "cdpruner", upstream="compact"),
    "holov": Method("HoloV", "holov", upstream="compact"),
    "dart": Method("DART", "dart", upstream="original"),
    "fastv": Method("FastV", "fastv", function=INSIDE, upstream="original"),
    "pyramiddrop": Method("PyramidDrop", "pyramiddrop", function=INSIDE, upstream="compact"),
    "sparsevlm": Method("SparseVLM", "sparsevlm", function=INSIDE, upstream="compact"),
    "sparsevlm+": Method("SparseVLM+", "sparsevlm", {"plus": True}, function=INSIDE, upstream="original"),
    "feather": Method("FEATHER", "feather", function=INSIDE, upstream="original"),
    "oracle": Method("target first (ground truth)", "oracle", truth=True),
    "anti_oracle": Method("target last (ground truth)", "oracle", {"last": True}, truth=True),
}


def all_pruners(inside: bool = True) -> list[str]:
    """Every method by name, without "none" and what reads the ground truth; inside: with those that drop tokens inside
    the decoder."""
    return [n for n, one in PRUNERS.items() if n != "none" and not one.truth and (inside or not one.inside)]


def _outside(spec: str) -> tuple[str, Method, str]:
    """Name, method and options of "path/to/file.py:function[:options]". ValueError where there is no such function."""
    path, _, rest = spec.partition(".py:")
    function, _, written = rest.partition(":")
    name, method = f"{path}.py:{function}", Method(function, f"{path}.py", function=function)
    try:
        prune = method.prune
    except Exception as error:  # a person's own file can raise anything
        raise ValueError(f"pruner {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(prune):
        raise ValueError(f"pruner {name!r} is no function but {type(prune).__name__}")
    return name, method, written


def pruner(spec: str) -> Method:
    """The method that a specification names, its options set. Raises ValueError on an unknown name or option."""
    if not isinstance(spec, str):
        raise ValueError(f"a pruner is named by a text such as 'trim' or 'trim:anchor=last', got {spec!r:.60}")
    if ".py:" in spec:
        name, method, written = _outside(spec)
    else:
        name, _, written = spec.partition(":")
        method = pick(PRUNERS, name, "pruner")
    valid, options = _options(method.prune), {}
    places = not method.inside and name != "none"
    for part in written.split(",") if written else ():
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"an option is written option=value, got {part!r} in {spec!r}")
        known = [*valid, "inside"] if places else [*valid]
        if not known:
            raise ValueError(f"pruner {name!r} takes no options, got {spec!r}")
        pick(dict.fromkeys(known), option, f"option of pruner {name!r}")
        if option in options:
            raise ValueError(f"option {option!r} stands twice in {spec!r:.100}")
        try:
            options[option] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"option {option!r} in {spec!r:.100} has a value that cannot be read: {error}") from error
    layer = options.pop("inside", 0) if places else 0
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise ValueError(
            f"option inside is the number of a layer of the decoder, from 0, got {layer!r} in {spec!r:.100}"
        )
    return replace(method, options={**method.options, **options}, layer=layer)
