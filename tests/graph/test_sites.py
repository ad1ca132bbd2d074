"""Sites: every form that is found, every near miss that is not, and the patterns that name them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import tiny
from equality import parse

from onnxcomp.errors import RecipeError, UnsupportedSite
from onnxcomp.graph.convert import to_graph
from onnxcomp.graph.prepare import prepare
from onnxcomp.graph.sites import Site, check_pattern, find_sites, join, matches, select
from onnxcomp.runtime import infer_types

F = np.float32
W, ROW, SQUARE = np.ones((4, 6), F), np.ones(6, F), np.ones((4, 4), F)


def graph(body: str, shape: str = "N,4", prepared: bool = False, **weights: object) -> gs.Graph:
    constants: dict[str, object] = {"w": W, "b": ROW, "k": np.ones((6, 4, 1, 1), F), "kb": ROW} | weights
    used = {
        key: np.asarray(v) for key, v in constants.items() if f" {key}," in body or f" {key})" in body or f"({key}," in body
    }
    model = parse(f"g (float[{shape}] x) => (float y) {{ {body} }}", used, opset=21)
    return prepare(model, infer_types).graph if prepared else to_graph(model)


def only(found: gs.Graph) -> Site:
    (site,) = find_sites(found)
    return site


# --- forms -----------------------------------------------------------------------------------------------------------


def test_a_matmul_with_a_constant_weight_is_a_layer():
    assert only(graph("[fc] y = MatMul(x, w)")) == Site(
        "fc", "MatMul", "layer", ("x",), "y", "y", -1, fixed_tokens=True, weight="w", weight_axis=1
    )


@pytest.mark.parametrize("operands", ["h, b", "b, h"])
def test_the_add_of_a_constant_behind_a_matmul_is_its_bias(operands: str):
    found = only(graph(f"[fc] h = MatMul(x, w) [add] y = Add({operands})"))

    assert (found.raw, found.y, found.bias, found.bias_node) == ("h", "y", "b", "add")


def test_a_bias_of_one_row_is_a_bias():
    assert only(graph("[fc] h = MatMul(x, w) [add] y = Add(h, b)", b=np.ones((1, 6), F))).bias_node == "add"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("[fc] h = MatMul(x, w) [add] y = Add(h, c)", "one number is no bias"),
        ("[fc] h = MatMul(x, w) [add] g = Add(h, b) y = Mul(g, h)", "the product is read twice"),
        ("[fc] h = MatMul(x, w) [add] y = Add(h, h)", "nothing is constant"),
        ("[fc] h = MatMul(x, w) [sub] y = Sub(h, b)", "a difference is no Add"),
    ],
)
def test_what_is_no_bias_add_stays_behind_the_site(body: str, why: str):
    found = only(graph(body, c=np.ones(1, F)))

    assert (found.y, found.bias, found.bias_node) == ("h", None, None), why


def test_a_gemm_has_its_bias_inside():
    assert only(graph("[fc] y = Gemm(x, w, b)")) == Site(
        "fc", "Gemm", "layer", ("x",), "y", "y", -1, weight="w", weight_axis=1, bias="b"
    )
    assert only(graph("[fc] y = Gemm(x, w)")).bias is None


@pytest.mark.parametrize(
    "body",
    ["Gemm<alpha = 0.5>(x, w, b)", "Gemm<beta = 2.0>(x, w, b)", "Gemm<transB = 1>(x, v)", "Gemm<transA = 1>(x, v)"],
)
def test_a_gemm_that_is_not_plain_is_no_site(body: str):
    assert find_sites(graph(f"[fc] y = {body}", "4,4", v=SQUARE)) == ()


@pytest.mark.parametrize("b", [np.ones((4, 6), F), np.ones(1, F)])
def test_a_gemm_whose_bias_is_no_row_is_no_site(b: np.ndarray):
    assert find_sites(graph("[fc] y = Gemm(x, w, b)", "4,4", b=b)) == ()


def test_a_conv_has_its_channels_in_front():
    assert only(graph("[c] y = Conv(x, k, kb)", "N,4,5,5")) == Site(
        "c", "Conv", "layer", ("x",), "y", "y", 1, rank=4, weight="k", weight_axis=0, bias="kb"
    )


def test_a_conv_of_one_dimension_has_rank_three():
    assert only(graph("[c] y = Conv(x, k)", "N,4,5", k=np.ones((6, 4, 1), F))).rank == 3


def test_a_matmul_of_two_activations_is_a_product():
    found = only(graph("h = Neg(x) [p] y = MatMul(x, h)", "N,4,4"))

    assert (found.kind, found.inputs, found.x, found.weight) == ("product", ("x", "h"), "x", None)


def test_a_product_with_itself_reads_its_input_twice():
    assert only(graph("[p] y = MatMul(x, x)", "4,4")).inputs == ("x", "x")


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("[fc] y = MatMul(w, x)", {"w": SQUARE}),  # the constant stands on the left
        ("[fc] y = MatMul(x, w)", {"w": np.ones(4, F)}),  # a vector
        ("[fc] y = MatMul(x, w)", {"w": np.ones((3, 4, 4), F)}),  # a stack of matrices
        ("h = Cast<to = 11>(x) [fc] y = MatMul(h, w)", {"w": np.ones((4, 4), np.float64)}),
        ("v = Neg(w) [c] y = Conv(x, v)", {"w": np.ones((6, 4, 1), F)}),  # computed
    ],
)
def test_these_are_no_sites(body: str, weights: dict[str, object]):
    shape = "3,4,4" if "Conv" in body else "4,4"

    assert find_sites(graph(body, shape, **weights)) == ()


def test_an_operator_of_another_domain_is_no_site():
    model = parse("g (float[N,4] x) => (float y) { [fc] y = other.MatMul(x, w) }", {"w": W}, opset=21, domains=', "other" : 1')

    assert find_sites(to_graph(model)) == ()


def test_sites_are_in_the_order_of_the_graph():
    prepared = prepare(tiny.transformer().model, infer_types).graph

    found = [(s.name, s.kind) for s in find_sites(prepared)]

    assert found == [
        ("q", "layer"), ("k", "layer"), ("v", "layer"), ("scores", "product"), ("values", "product"),
        ("proj", "layer"), ("fc1", "layer"), ("fc2", "layer"), ("head", "layer"),
    ]  # fmt: skip


def test_control_flow_bodies_are_not_entered():
    text = """g (float[2,4] x, bool c) => (float[2,6] y) {
        [if] y = If (c) <
            then_branch = a () => (float[2,6] p) { [inside] p = MatMul(x, w) },
            else_branch = b () => (float[2,6] q) { [too] q = MatMul(x, w) }
        >
    }"""

    assert find_sites(to_graph(parse(text, {"w": W}))) == ()


def test_a_join_reads_the_activations_among_its_inputs():
    (node,) = graph("[j] y = Add(x, b)", "N,6").nodes

    assert join(node) == Site("j", "Add", "join", ("x",), "y", "y", 1)


# --- a fixed number of tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "fixed"), [("N,7,4", True), ("1,7,4", True), ("N,T,4", False), ("N,7,C", False)])
def test_tokens_are_fixed_where_every_axis_of_the_inputs_but_the_first_is(shape: str, fixed: bool):
    assert only(graph("[fc] y = MatMul(x, w)", shape, prepared=True)).fixed_tokens is fixed


def test_a_conv_and_a_gemm_have_no_tokens():
    assert only(graph("[c] y = Conv(x, k)", "N,4,5", k=np.ones((6, 4, 1), F))).fixed_tokens is False
    assert only(graph("[fc] y = Gemm(x, w, b)")).fixed_tokens is False


# --- patterns --------------------------------------------------------------------------------------------------------

SITES = tuple(Site(name, op, "layer", ("x",), "y", "y", -1) for name, op in [
    ("/blocks.0/fc1", "MatMul"), ("/blocks.0/fc2", "MatMul"), ("/blocks.1/fc1", "MatMul"), ("/head[0]", "Gemm"),
])  # fmt: skip
NAMES = (*(s.name for s in SITES), "/norm")


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("*", (0, 1, 2, 3)),
        ("/blocks.0/*", (0, 1)),
        ("*fc1", (0, 2)),
        ("/blocks.?/fc2", (1,)),
        ("/BLOCKS*", ()),
        ("re:fc[12]$", (0, 1, 2)),
        ("re:^/blocks\\.1", (2,)),
        ("op:Gemm", (3,)),
        ("op:gemm", ()),
        ("op:Conv", ()),
    ],
)
def test_a_pattern_names_sites(pattern: str, hits: tuple[int, ...]):
    assert tuple(i for i, site in enumerate(SITES) if matches(pattern, site)) == hits


def chosen(include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
    return [s.name for s in select(SITES, include, exclude, NAMES)]


def test_without_patterns_every_site_is_selected():
    assert chosen() == [s.name for s in SITES]


def test_exclude_wins_over_include():
    assert chosen(("*blocks*",), ("op:Gemm", "*fc2")) == ["/blocks.0/fc1", "/blocks.1/fc1"]


def test_sites_stay_in_graph_order_whatever_the_order_of_patterns():
    assert chosen(("op:Gemm", "*fc1")) == ["/blocks.0/fc1", "/blocks.1/fc1", "/head[0]"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("/blocks.1/fc", "Pattern '/blocks.1/fc' matches no site. Did you mean '/blocks.1/fc1'?"),
        ("zzz", "Pattern 'zzz' matches no site. `onnxcomp inspect MODEL` lists the sites."),
        ("op:Conv", "Pattern 'op:Conv' matches no site. The model has sites of type Gemm, MatMul."),
        ("re:[", "Pattern 're:[' is not a regular expression: unterminated character set at position 0."),
    ],
)
@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, text: str, where: str):
    with pytest.raises(RecipeError) as caught:
        chosen(**{where: (pattern,)})

    assert str(caught.value) == text


def test_a_model_without_sites_says_so():
    with pytest.raises(RecipeError) as caught:
        check_pattern("op:Conv", (), (), required=True)

    assert str(caught.value) == "Pattern 'op:Conv' matches no site. The model has sites of type none."


def test_including_what_is_no_site_is_refused_by_name():
    with pytest.raises(UnsupportedSite) as caught:
        chosen(("/norm",))

    assert str(caught.value) == (
        "/norm: it is no Conv, Gemm or MatMul with a constant weight, so it cannot be quantized. Leave '/norm' out of include."
    )


def test_excluding_what_is_no_site_is_no_error():
    assert chosen(exclude=("/norm",)) == [s.name for s in SITES]
