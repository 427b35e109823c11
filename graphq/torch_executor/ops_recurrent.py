"""RNN, GRU and LSTM, step by step: with any activation, in either direction or both, over sequences of several lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphq.torch_executor.table import Call, operator

Activation = Callable[[Tensor], Tensor]
State = list[Tensor]
Cell = Callable[[Tensor, State], State]

_PLAIN: dict[str, Activation] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softsign": torch.nn.functional.softsign,
    "softplus": torch.nn.functional.softplus,
}  # fmt: skip


def _activations(call: Call, names: list[str]) -> list[Activation]:
    """The functions of all directions, each limited to `clip` before it is applied."""
    limit = call.get("clip")
    alphas, betas = iter(call.get("activation_alpha") or []), iter(call.get("activation_beta") or [])
    count = 2 if call.get("direction", "forward") == "bidirectional" else 1
    found = []
    for name in call.get("activations") or names * count:
        function = _activation(name.lower(), alphas, betas)
        found.append(function if limit is None else _limited(function, limit))
    return found


def _limited(function: Activation, limit: float) -> Activation:
    return lambda x: function(torch.clamp(x, -limit, limit))


def _activation(name: str, alphas: Any, betas: Any) -> Activation:
    if name in _PLAIN:
        return _PLAIN[name]
    alpha = next(alphas, {"leakyrelu": 0.01, "thresholdedrelu": 1.0, "hardsigmoid": 0.2, "elu": 1.0}.get(name, 1.0))
    if name == "leakyrelu":
        return lambda x: torch.nn.functional.leaky_relu(x, alpha)
    if name == "thresholdedrelu":
        return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))
    if name == "elu":
        return lambda x: torch.nn.functional.elu(x, alpha)
    beta = next(betas, 0.5 if name == "hardsigmoid" else 0.0)
    if name == "hardsigmoid":
        return lambda x: torch.clamp(alpha * x + beta, 0, 1)
    if name == "scaledtanh":
        return lambda x: alpha * torch.tanh(beta * x)
    return lambda x: alpha * x + beta


def _run(call: Call, x: Tensor, lengths: Tensor | None, first: list[Tensor | None], cells: list[Cell]) -> tuple[Tensor, list[Tensor]]:
    """All hidden states [length, directions, N, hidden], and the last states, each [directions, N, hidden]."""
    turned = bool(call.get("layout", 0))
    x = x.transpose(0, 1) if turned else x
    steps, batch, hidden = x.shape[0], x.shape[1], call.get("hidden_size")
    first = [one.transpose(0, 1) if turned and one is not None else one for one in first]
    rows, ends = [], []
    for place, cell in enumerate(cells):
        back = place == 1 or call.get("direction", "forward") == "reverse"
        state = [x.new_zeros(batch, hidden) if one is None else one[place] for one in first]
        row: list[Tensor] = []
        for step in reversed(range(steps)) if back else range(steps):
            new = cell(x[step], state)
            if lengths is None:
                row.append(new[0])
                state = new
            else:
                live = (step < lengths.to(x.device)).unsqueeze(-1)
                row.append(torch.where(live, new[0], torch.zeros_like(new[0])))
                state = [torch.where(live, one, old) for one, old in zip(new, state, strict=True)]
        rows.append(torch.stack(row[::-1] if back else row))
        ends.append(state)
    y, last = torch.stack(rows, 1), [torch.stack(one) for one in zip(*ends, strict=True)]
    return (y.permute(2, 0, 1, 3), [one.transpose(0, 1) for one in last]) if turned else (y, last)


def _biases(bias: Tensor | None, place: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the input and of the state."""
    return (weight.new_zeros(weight.shape[1]),) * 2 if bias is None else tuple(bias[place].chunk(2))  # type: ignore[return-value]


@operator("RNN")
def rnn(call: Call, x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None,
        h: Tensor | None = None) -> Any:  # fmt: skip
    functions = _activations(call, ["Tanh"])

    def cell(place: int) -> Cell:
        wb, rb = _biases(bias, place, w)
        return lambda x, state: [functions[place](x @ w[place].T + state[0] @ r[place].T + wb + rb)]

    y, last = _run(call, x, lengths, [h], [cell(place) for place in range(w.shape[0])])
    return y if len(call.wanted) == 1 else (y, *last)


@operator("GRU")
def gru(call: Call, x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None,
        h: Tensor | None = None) -> Any:  # fmt: skip
    functions, after = _activations(call, ["Sigmoid", "Tanh"]), bool(call.get("linear_before_reset", 0))

    def cell(place: int) -> Cell:
        gate, shape = functions[2 * place : 2 * place + 2]
        wb, rb = _biases(bias, place, w)
        (wz, wr, wh), (rz, rr, rh) = w[place].chunk(3), r[place].chunk(3)
        (wbz, wbr, wbh), (rbz, rbr, rbh) = wb.chunk(3), rb.chunk(3)

        def run(x: Tensor, state: State) -> State:
            h = state[0]
            update, reset = gate(x @ wz.T + h @ rz.T + wbz + rbz), gate(x @ wr.T + h @ rr.T + wbr + rbr)
            recurrent = reset * (h @ rh.T + rbh) if after else (reset * h) @ rh.T + rbh
            return [(1 - update) * shape(x @ wh.T + recurrent + wbh) + update * h]

        return run

    y, last = _run(call, x, lengths, [h], [cell(place) for place in range(w.shape[0])])
    return y if len(call.wanted) == 1 else (y, *last)


@operator("LSTM")
def lstm(call: Call, x: Tensor, w: Tensor, r: Tensor, bias: Tensor | None = None, lengths: Tensor | None = None, h: Tensor | None = None,
         c: Tensor | None = None, peepholes: Tensor | None = None) -> Any:  # fmt: skip
    functions = _activations(call, ["Sigmoid", "Tanh", "Tanh"])

    def cell(place: int) -> Cell:
        gate, shape, show = functions[3 * place : 3 * place + 3]
        total = sum(_biases(bias, place, w))
        pi, po, pf = (0, 0, 0) if peepholes is None else peepholes[place].chunk(3)

        def run(x: Tensor, state: State) -> State:
            h, c = state
            i, o, f, new = (x @ w[place].T + h @ r[place].T + total).chunk(4, -1)
            i = gate(i + pi * c)
            f = 1 - i if call.get("input_forget", 0) else gate(f + pf * c)
            c = f * c + i * shape(new)
            return [gate(o + po * c) * show(c), c]

        return run

    y, last = _run(call, x, lengths, [h, c], [cell(place) for place in range(w.shape[0])])
    return y if len(call.wanted) == 1 else (y, *last)
