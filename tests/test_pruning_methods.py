"""The published methods against references written from their formulas, one token at a time in plain Python."""

from dataclasses import replace
from fractions import Fraction
from math import ceil, exp, floor, inf, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.pruning import PRUNERS, pruner
from analysis.types import Signals
from tests.support.visual import visual

few = settings(max_examples=50, deadline=None)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def cosine(a, b):
    return dot(a, b) / sqrt(dot(a, a) * dot(b, b))


def softmax(logits):
    powers = [exp(x - max(logits)) for x in logits]
    return [x / sum(powers) for x in powers]


def best(scores, k):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def quartile(scores, q):
    at, ordered = q * (len(scores) - 1), sorted(scores)
    low = floor(at)
    return ordered[low] + (at - low) * (ordered[ceil(at)] - ordered[low])


def outliers(scores):
    q1, q3 = quartile(scores, 0.25), quartile(scores, 0.75)
    return sum(x > q3 + 1.5 * (q3 - q1) for x in scores)


def total(weights, vectors):
    return [dot(weights, column) for column in zip(*vectors)]


class Image:
    """One image in Python floats. Tokens are (feature, origin, synthetic)."""

    def __init__(self, tokens, index):
        self.rows, self.columns = tokens.grid
        self.n = self.rows * self.columns
        self.connect, self.features, self.signals, self.index = tokens.connect, tokens.features, tokens.signals, index

    def __getattr__(self, name):
        return getattr(self.signals, name)[self.index].tolist()

    def own(self, chosen):
        return [(self.features[self.index, i].tolist(), i, False) for i in chosen]

    def token(self, patch, origin, synthetic):
        return self.connect(torch.tensor(patch)).tolist(), origin, synthetic

    def anchor(self, name, members, weights):
        if name == "last":
            return self.n - 1
        weights = [Fraction(w) for w in weights]
        row = dot(weights, [i // self.columns for i in members]) / sum(weights)
        column = dot(weights, [i % self.columns for i in members]) / sum(weights)
        return floor(row + Fraction(1, 2)) * self.columns + floor(column + Fraction(1, 2))


def text_similarity(image, k, about="expression", lowest=False):
    words, sign = {"expression": image.clip_text, "prompt": image.clip_prompt}[about], -1 if lowest == "true" else 1
    return image.own(best([sign * cosine(patch, words) for patch in image.clip_patches], k))


def fastervlm(image, k):
    return image.own(sorted(best(image.cls_attention, k)))


def divprune(image, k):
    tokens, chosen = [token for token, _, _ in image.own(range(image.n))], []

    def nearest(i):
        others = chosen or [j for j in range(image.n) if j != i]
        return -inf if i in chosen else min((1 - cosine(tokens[i], tokens[j]) for j in others), default=inf)

    for _ in range(k):
        chosen.append(max(range(image.n), key=nearest))
    return image.own(sorted(chosen))


def room(k, n, scores, anchor):
    """How many existing tokens stay, and whether a leftover token may follow."""
    if k is None:
        return max(1, outliers(scores)), anchor != "drop"
    leftover = anchor != "drop" and 1 < k < n
    return (k - 1 if leftover else k), leftover


def trim(image, k, about="prompt", anchor="centroid", lowest=True, layer="last"):
    words = {"expression": image.clip_text, "prompt": image.clip_prompt}[about]
    sign = -1 if lowest is True else 1  # written "false" in a specification
    patches = {"last": image.clip_patches, "read": image.clip_read}[layer]
    scores = softmax([sign * dot(patch, words) for patch in patches])
    m, leftover = room(k, image.n, scores, anchor)
    chosen = sorted(best(scores, m))
    pruned = [i for i in range(image.n) if i not in chosen]
    found = image.own(chosen)
    if leftover and pruned:
        mean = total([1 / len(pruned)] * len(pruned), [image.patches[i] for i in pruned])
        found.append(image.token(mean, image.anchor(anchor, pruned, [1] * len(pruned)), True))
    return found


def prumerge(image, k, plus=False, anchor="centroid", overlap=False):
    n, patches, query = image.n, image.patches, image.cls_query
    a = softmax([dot(query, key) / sqrt(len(query)) for key in image.keys])[1:]
    keys = image.keys[1:]
    m, leftover = room(k, n, a, anchor)
    chosen = best(a, ceil(m / 2) if plus and k is not None else m)
    rest = [i for i in range(n) if i not in chosen]
    if plus and k is None:
        chosen += [i for i in range(0, n - 1, max(1, n // m // 3)) if i in rest]
    elif plus and overlap:
        spread = m - len(chosen)
        chosen += [i for i in (floor((j + 0.5) * n / spread) for j in range(spread)) if i in rest]
    elif plus:
        spread = m - len(chosen)
        chosen += [rest[floor((j + 0.5) * len(rest) / spread)] for j in range(spread)]
    pruned = [i for i in range(n) if i not in chosen]
    if not pruned:
        return image.own(chosen)
    found = []
    for i in chosen:
        near = sorted((j for j in range(n) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:32]
        merged = total([1, *(a[j] for j in near)], [patches[i], *(patches[j] for j in near)])
        found.append(image.token(merged, i, False))
    if leftover:
        weights = [a[j] for j in pruned]
        token = total(weights, [patches[j] for j in pruned])
        found.append(image.token(token, image.anchor(anchor, pruned, weights), True))
    return found


def visionzip(image, k, keys="last"):
    c = 0 if k == image.n else floor(10 * k / 64 + 0.5)
    dominant = sorted(best(image.cls_attention, k - c))
    rest = [i for i in range(image.n) if i not in dominant]
    targets = rest[:: len(rest) // c][:c] if c else []
    joined = {target: [] for target in targets}
    for i in rest:
        if c and i not in targets:
            key = (image.read_keys if keys == "read" else image.keys)[1:]
            joined[max(targets, key=lambda target: cosine(key[i], key[target]))].append(image.patches[i])
    found = image.own(dominant)
    for target in targets:
        share = [1 / len(joined[target]) for _ in joined[target]]
        found.append(image.token(total([1, *share], [image.patches[target], *joined[target]]), target, True))
    return found


def vispruner(image, k, important=0.5):
    order = best(image.cls_attention, image.n)
    m = int(float(important) * k)
    chosen, rest, patches = order[:m], order[m:], image.patches
    while len(chosen) < k < len(chosen) + len(rest):
        even, odd = rest[::2], rest[1::2]
        likeness = {i: max(cosine(patches[i], patches[j]) for j in odd) for i in even}
        even.sort(key=lambda i: -likeness[i])
        rest = even[min(8, len(chosen) + len(rest) - k, len(even)) :] + odd
    return image.own(sorted((chosen + rest)[:k]))


def cdpruner(image, k, about="prompt", lowest=True, layer="last"):
    """A token's gain is its distance from the span of the chosen ones: here by orthogonal directions."""
    words, sign = {"expression": image.clip_text, "prompt": image.clip_prompt}[about], -1 if lowest is True else 1
    similar = [sign * cosine(patch, words) for patch in {"last": image.clip_patches, "read": image.clip_read}[layer]]
    span = max(similar) - min(similar)
    relevance = [(x - min(similar) + 1e-6) / span if span > 1e-9 else 1.0 for x in similar]
    left = [
        [r * x / sqrt(dot(token, token)) for x in token]
        for r, (token, _, _) in zip(relevance, image.own(range(image.n)))
    ]
    chosen = []
    for _ in range(k):
        others = [i for i in range(image.n) if i not in chosen]
        gains = {i: dot(left[i], left[i]) for i in others}
        one = max(others, key=lambda i: gains[i] if gains[i] > 1e-13 else relevance[i] - 2)
        chosen.append(one)
        if gains[one] > 1e-13:
            unit = [x / sqrt(gains[one]) for x in left[one]]
            left = [[x - dot(vector, unit) * u for x, u in zip(vector, unit)] for vector in left]
    return image.own(sorted(chosen))


def holov(image, k, crops=16):
    n, crops, tokens = image.n, int(crops), [token for token, _, _ in image.own(range(image.n))]
    bounds, parts = 0, []
    for c in range(crops):
        length = n // crops + (c < n % crops)
        parts += [list(range(bounds, bounds + length))] * (length > 0)
        bounds += length
    scores = []
    for part in parts:
        seen, others = [1000 * image.cls_attention[i] for i in part], max(1, len(part) - 1)
        norms = {i: sqrt(dot(tokens[i], tokens[i])) + 1e-6 for i in part}
        spread = []
        for i in part:
            alike = [dot(tokens[i], tokens[j]) / norms[i] / norms[j] if i != j else 0 for j in part]
            mean = sum(alike) / others
            spread.append(sum((x - mean) ** 2 for x in alike) / others)
        scale = sum(map(abs, seen)) / len(part) / (sum(spread) / len(part) + 1e-6)
        scores.append(max(0, sum(x + 0.09 * scale * v for x, v in zip(seen, spread)) / len(part)))
    order = best(scores, len(parts))
    quotas = [floor(k * score / (sum(scores) + 1e-6)) for score in scores]
    for c in order[: max(0, k - sum(quotas))]:
        quotas[c] += 1
    quotas = [min(quota, len(part)) for quota, part in zip(quotas, parts)]
    while sum(quotas) < k:
        for c in order:
            quotas[c] += quotas[c] < len(parts[c]) and sum(quotas) < k
    chosen = []
    for quota, part in zip(quotas, parts):
        most = sorted(part, key=lambda i: -image.cls_attention[i])[:quota]
        chosen += part if quota == len(part) else most
    return image.own(chosen)


def dart(image, k, pivots=8):
    tokens = [token for token, _, _ in image.own(range(image.n))]
    chosen = best([sum(map(abs, key)) for key in image.keys[1:]], min(int(pivots), k))
    p = len(chosen)
    for i, pivot in enumerate(chosen[:]):
        others = sorted((j for j in range(image.n) if j not in chosen), key=lambda j: cosine(tokens[pivot], tokens[j]))
        chosen += others[: (k - p) // p + (i < (k - p) % p)]
    return image.own(sorted(chosen))


REFERENCES = {
    "text_similarity": text_similarity,
    "prumerge": prumerge,
    "trim": trim,
    "fastervlm": fastervlm,
    "divprune": divprune,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "cdpruner": cdpruner,
    "holov": holov,
    "dart": dart,
}
SPECS = [
    "text_similarity",
    "text_similarity:about=prompt",
    "text_similarity:lowest=true",
    "prumerge",
    "prumerge:anchor=last",
    "prumerge:anchor=drop",
    "prumerge+",
    "prumerge+:anchor=last",
    "prumerge+:anchor=drop",
    "prumerge+:overlap=true",
    "trim",
    "trim:about=expression,anchor=last",
    "trim:anchor=drop",
    "trim:lowest=false",
    "trim:layer=read",
    "fastervlm",
    "divprune",
    "visionzip",
    "visionzip:keys=read",
    "vispruner",
    "vispruner:important=0.8",
    "cdpruner",
    "cdpruner:about=expression,lowest=false",
    "cdpruner:layer=read",
    "holov",
    "holov:crops=6",
    "dart",
    "dart:pivots=3",
]
OVERLAP = "prumerge+:overlap=true"  # may keep fewer than asked for
ADAPTIVE = [spec for spec in SPECS if spec.startswith(("prumerge", "trim"))]


def reference(spec, tokens, index, k):
    name, _, written = spec.partition(":")
    options = dict(part.split("=") for part in written.split(",")) if written else {}
    if name == "prumerge+":
        name, options["plus"] = "prumerge", True
    return REFERENCES[name](Image(tokens, index), k, **options)


def flat(batch=3, rows=8, columns=6):
    """Signals under which every score ties, exactly in any arithmetic."""
    n, unit = rows * columns, 2 * torch.eye(7)[0]
    return visual(
        batch,
        rows,
        columns,
        features=unit[:5].expand(batch, n, 5),
        cls_attention=torch.full((batch, n), 0.5),
        keys=unit.expand(batch, 1 + n, 7),
        read_keys=unit[:3].expand(batch, 1 + n, 3),
        cls_query=torch.zeros(batch, 7),
        clip_patches=unit[:6].expand(batch, n, 6),
        clip_read=unit[:6].expand(batch, n, 6),
    )


INPUTS = {
    "random": visual(3, 6, 4),
    "larger": visual(2, 8, 6, seed=1),
    "peaked": visual(3, 8, 6, seed=2),
    "flat": flat(),
    "one": visual(2, 1, 1),
    "two": visual(2, 1, 2),
}
INPUTS["peaked"] = visual(3, 8, 6, seed=2, cls_query=4 * INPUTS["peaked"].signals.cls_query)


def check(spec, tokens, k):
    n = tokens.features.shape[1]
    found = pruner(spec)(tokens, None if k is None else k / n)
    assert len(found) == len(tokens.features)
    for index, one in enumerate(found):
        features, origin, synthetic = zip(*reference(spec, tokens, index, k))
        assert one.origin.tolist() == list(origin) and one.synthetic.tolist() == list(synthetic)
        assert one.origin.dtype == torch.int64 and one.synthetic.dtype == torch.bool
        torch.testing.assert_close(one.features, torch.tensor(features), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_fixed_keep_against_the_reference(spec, kind):
    n = INPUTS[kind].features.shape[1]
    for k in sorted({1, 2, 3, 4, 7, n // 4, n // 2, n - 2, n - 1, n} & set(range(1, n + 1))):
        check(spec, INPUTS[kind], k)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spec", ADAPTIVE)
def test_adaptive_keep_against_the_reference(spec, kind):
    check(spec, INPUTS[kind], None)


def test_the_inputs_reach_both_sides_of_the_fence():
    for spec in ("prumerge", "trim"):
        counts = {len(one.origin) for tokens in INPUTS.values() for one in pruner(spec)(tokens, None)}
        assert {1, 2} < counts and max(counts) > 4
    assert len({len(one.origin) for one in pruner("prumerge")(INPUTS["peaked"], None)}) > 1  # within a batch


@few
@given(
    st.sampled_from(SPECS),
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0.001, 1) | st.just(1),
    st.integers(0, 99),
)
def test_a_fixed_keep_is_met_exactly_with_distinct_tokens(spec, rows, columns, keep, seed):
    tokens, n = visual(2, rows, columns, seed), rows * columns
    for image, one in enumerate(pruner(spec)(tokens, keep)):
        k = max(1, floor(keep * n + 0.5))
        assert len(one.origin) == len(one.features) == len(one.synthetic) <= k
        assert len(one.origin) == k or spec == OVERLAP
        well_formed(one, n)
        if not spec.startswith("prumerge") or len(one.origin) == n:
            own = ~one.synthetic
            assert one.features[own].equal(tokens.features[image, one.origin[own]])


def well_formed(one, n):
    own = one.origin[~one.synthetic]
    assert len(own.unique()) == len(own) > 0
    assert one.origin.min() >= 0 and one.origin.max() < n
    assert one.synthetic.equal(one.synthetic.sort(stable=True).values)  # synthetic tokens come last


@few
@given(st.sampled_from(ADAPTIVE), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_an_adaptive_keep_gives_distinct_tokens_and_one_leftover(spec, rows, columns, seed):
    tokens, n = visual(2, rows, columns, seed), rows * columns
    for one in pruner(spec)(tokens, None):
        well_formed(one, n)
        prunes = int((~one.synthetic).sum()) < n
        assert int(one.synthetic.sum()) == (prunes and "drop" not in spec)


def same(a, b):
    assert a.origin.equal(b.origin) and a.synthetic.equal(b.synthetic)
    torch.testing.assert_close(a.features, b.features, rtol=0, atol=1e-5)


@few
@given(
    st.sampled_from([(spec, k) for spec in SPECS for k in (0.1, 0.5, 1)] + [(spec, None) for spec in ADAPTIVE]),
    st.permutations(range(3)),
    st.integers(0, 99),
)
def test_images_do_not_depend_on_their_batch(case, order, seed):
    (spec, keep), tokens = case, visual(3, 7, 6, seed)
    together = pruner(spec)(tokens, keep)
    for image, one in zip(order, pruner(spec)(tokens.take(torch.tensor(order)), keep)):
        same(one, together[image])
        same(one, pruner(spec)(tokens.take(torch.tensor([image])), keep)[0])


class Upcast:
    def __init__(self, signals):
        self.signals = signals

    def __getattr__(self, name):
        return getattr(self.signals, name).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_half_precision_scores_in_float32(spec, dtype):
    low = visual(dtype=dtype)
    high = replace(visual(), features=low.features.float(), signals=Upcast(low.signals))
    for keep in (0.3, 1, *([None] if spec in ADAPTIVE else [])):
        for one, exact in zip(pruner(spec)(low, keep), pruner(spec)(high, keep)):
            assert one.origin.equal(exact.origin) and one.features.dtype == dtype
            torch.testing.assert_close(one.features.float(), exact.features, rtol=0.02, atol=0.1)


def test_scores_that_half_precision_cannot_hold_apart():
    """2048 + 1 is 2048 in half precision; the tie would go to the first patch."""
    clip = torch.tensor([[[2048, 1], [2048, 0]]], dtype=torch.float16)
    tokens = visual(1, 1, 2, clip_patches=clip, clip_prompt=torch.ones(1, 2, dtype=torch.float16))
    assert pruner("trim")(tokens, 0.5)[0].origin.tolist() == [1]


def test_keys_that_half_precision_cannot_hold_apart():
    """Both cosines, 1 - 0.0002 and 1 - 0.00005, are 1 in half precision; the tie would go to the first target."""
    keys = torch.tensor([[[100.0, 2.0]]], dtype=torch.float16).repeat(1, 14, 1)
    keys[0, 9], keys[0, 11] = torch.tensor([1, 0]), torch.tensor([100, 1])  # the targets, patches 8 and 10
    tokens = visual(1, 1, 13, keys=keys, cls_attention=torch.arange(13.0, 0, -1)[None])
    (one,) = pruner("visionzip")(tokens, 10 / 13)
    assert one.origin.tolist() == [*range(8), 8, 10]
    torch.testing.assert_close(one.features[8], tokens.connect(tokens.signals.patches[0, 8]))  # nothing joined


def test_visionzip_splits_as_published():
    tokens = visual(1, 24, 24)
    for k, contextual in [(64, 10), (128, 20), (192, 30)]:
        assert int(pruner("visionzip")(tokens, k / 576)[0].synthetic.sum()) == contextual


def test_a_centroid_where_all_attention_of_the_pruned_underflows():
    """[CLS] attends to patch 0 alone; the others weigh the same: mean row 15 / 5 = 3, mean column 0."""
    keys = torch.zeros(1, 7, 7)
    keys[0, 1, 0] = 1e4
    tokens = visual(1, 6, 1, keys=keys, cls_query=1e4 * torch.eye(7)[:1])
    assert pruner("prumerge")(tokens, 1 / 3)[0].origin.tolist() == [0, 3]


def test_the_centroid_goes_down_and_right_from_a_half():
    """Patches 1..3 of 2 x 2 are pruned: mean row 2 / 3, column 2 / 3; of 1 x 3, columns 1 and 2: mean 3 / 2."""
    clip = -torch.ones(1, 4, 6)
    clip[0, 0] = -9
    words = torch.ones(1, 6)
    assert pruner("trim")(visual(1, 2, 2, clip_patches=clip, clip_prompt=words), 0.5)[0].origin.tolist() == [0, 3]
    row = visual(1, 1, 3, clip_patches=clip[:, :3], clip_prompt=words)
    assert pruner("trim")(row, 2 / 3)[0].origin.tolist() == [0, 2]


@pytest.mark.parametrize("spec", SPECS)
def test_only_methods_about_text_read_text(spec):
    """All others are selected once for an image, for all its expressions."""
    tokens = visual()
    pruner(spec)(tokens, 0.5)
    name, _, options = spec.partition(":")
    reads = "clip_text" if name == "text_similarity" else "clip_prompt"
    reads = {"about=prompt": "clip_prompt", "about=expression": "clip_text"}.get(options.split(",")[0], reads)
    wanted = {reads} if name in ("text_similarity", "trim", "cdpruner") else set()
    assert tokens.signals.asked & Signals.OF_EXPRESSION == wanted


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in ADAPTIVE])
def test_only_some_methods_decide_the_budget_themselves(spec):
    with pytest.raises(ValueError, match="keep ratio must be in .* got None"):
        pruner(spec)(visual(), None)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
@pytest.mark.parametrize("spec", SPECS)
def test_bad_keep_ratio(spec, keep):
    with pytest.raises(ValueError, match=rf"keep ratio must be in \(0, 1\], got {keep}"):
        pruner(spec)(visual(), keep)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trim:anchor=lst", r"option anchor 'lst'; did you mean 'last'\? valid: centroid, last, drop"),
        ("prumerge:anchor=1", "option anchor 1; valid: centroid, last, drop"),
        ("trim:about=promt", r"option about 'promt'; did you mean 'prompt'\? valid: expression, prompt"),
        ("text_similarity:about=all", "option about 'all'; valid: expression, prompt"),
        ("prumerge:plus=maybe", "option plus 'maybe'; valid: true, false"),
        ("trim:anchr=last", "option of pruner 'trim' 'anchr'; did you mean 'anchor'.* valid: about, anchor"),
        ("prumerge+:about=prompt", "option of pruner 'prumerge[+]' 'about'; .*valid: plus, anchor"),
        ("divprune:anchor=last", "unknown option of pruner 'divprune' 'anchor'; valid: inside"),
        ("trim:layer=lst", r"option layer 'lst'; did you mean 'last'\? valid: last, read"),
        ("visionzip:keys=first", "option keys 'first'; valid: last, read"),
        ("vispruner:important=2", r"option important is the share .* in \[0, 1\], got 2"),
        ("holov:crops=0", "option crops .* at least 1, got 0"),
        ("holov:crops=true", "option crops .* at least 1, got True"),
        ("dart:pivots=0.5", "option pivots .* at least 1, got 0.5"),
    ],
)
def test_unknown_options_and_values(spec, message):
    with pytest.raises(ValueError, match=message):
        pruner(spec)(visual(), 1)


def test_plus_is_an_option_of_prumerge():
    same(pruner("prumerge:plus=true")(visual(), None)[0], PRUNERS["prumerge+"](visual(), None)[0])
