"""The compiled loop of the fused engine. Legend: T steps of a window, F input columns, H hidden state.

R rows: the gates are one product u @ rows of u = [h of the step before, x, 1, 1] with the rows of both weight matrices,
transposed, and of both biases. Zeros fill R up to a multiple of four. Weights and moments are kept like this during a
stretch: loops over 4H numbers become vector code, loops over F or H do so badly.

All that is compiled is in this file, for numba compiles anew when this file changes and does not look at others. And
all is inlined into `train`: otherwise a process that has compiled calls the helpers that it compiled one by one, a
process that loads `train` from the cache those inside it, and the two differ in their last bits.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray
Arrays = tuple[Array, ...]

# Sums may be taken in any order and products fused with them, but NaN and infinity are kept: they are tested for.
FAST = {"reassoc", "contract", "nsz", "arcp"}
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094172e-06  # their sum is ln 2; whole * LN2_HIGH is exact in float32
TAYLOR = tuple(1 / math.factorial(power) for power in range(13, 1, -1))


@intrinsic
def _two_to_the(context: Any, exponent: Any) -> Any:
    """2 ** exponent for a whole number in float32 or float64, by its bits: a loop around it becomes vector code."""
    bits, mantissa, bias = (32, 23, 127) if exponent == types.float32 else (64, 52, 1023)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = builder.fptosi(arguments[0], ir.IntType(32))
        word = ir.IntType(bits)
        whole = whole if bits == 32 else builder.sext(whole, word)
        raised = builder.shl(builder.add(whole, word(bias)), word(mantissa))
        return builder.bitcast(raised, context.get_value_type(signature.return_type))

    return exponent(exponent), build


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)
def _expm1(x: float) -> float:
    """exp(x) - 1, as exact near 0 as elsewhere: 2 ** whole * (1 + powers of the rest) - 1, summed in this order."""
    real = type(x)
    whole = np.floor(x * real(LOG2_E) + real(0.5))
    rest = x - whole * real(LN2_HIGH) - whole * real(LN2_LOW)
    powers = real(TAYLOR[0])
    for factor in TAYLOR[1:]:
        powers = powers * rest + real(factor)
    powers = (powers * rest + real(1)) * rest
    scale = _two_to_the(whole)
    return scale * powers + (scale - real(1))


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)
def _sigmoid(x: float) -> float:
    real = type(x)
    x = real(-80) if x < real(-80) else x
    x = real(80) if x > real(80) else x
    return real(1) / (real(2) + _expm1(-x))


@njit(fastmath={"contract"}, error_model="numpy", forceinline=True)
def _tanh(x: float) -> float:
    real = type(x)
    x = real(-20) if x < real(-20) else x
    x = real(20) if x > real(20) else x
    grown = _expm1(x + x)
    return grown / (grown + real(2))


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _adam(
    weights: Array, means: Array, squares: Array, direction: Array, scale: float, factors: tuple[float, ...]
) -> None:
    """Update one row of the weights with the gradient scale * direction."""
    rate, mean_share, square_decay, square_share, correction, epsilon = factors
    for i in range(weights.size):
        gradient = scale * direction[i]
        mean = means[i] + mean_share * (gradient - means[i])
        square = square_decay * squares[i] + square_share * gradient * gradient
        means[i] = mean
        squares[i] = square
        weights[i] -= rate * mean / (np.sqrt(square) * correction + epsilon)


@njit(error_model="numpy", forceinline=True)
def _copy(source: Array, target: Array) -> None:
    """Do target[:] = source, which takes seconds to compile, for one dimension."""
    for i in range(source.size):
        target[i] = source[i]


@njit(error_model="numpy", forceinline=True)
def _pack(tensors: Arrays, num_rows: int) -> tuple[Array, Array]:
    """Return the gates' weights and biases as [R, 4H], and those of the head as [H + 1]."""
    inputs, hidden, bias_inputs, bias_hidden, head, bias_head = tensors
    columns, size = inputs.shape[1], hidden.shape[1]
    rows, last = np.zeros((num_rows, 4 * size), inputs.dtype), np.empty(size + 1, inputs.dtype)
    for i in range(4 * size):
        _copy(hidden[i], rows[:size, i])
        _copy(inputs[i], rows[size : size + columns, i])
    _copy(bias_inputs, rows[size + columns])
    _copy(bias_hidden, rows[size + columns + 1])
    _copy(head[0], last)
    last[size] = bias_head[0]
    return rows, last


@njit(error_model="numpy", forceinline=True)
def _unpack(rows: Array, last: Array, tensors: Arrays) -> None:
    """Write what _pack has read back to where it came from."""
    inputs, hidden, bias_inputs, bias_hidden, head, bias_head = tensors
    columns, size = inputs.shape[1], hidden.shape[1]
    for i in range(4 * size):
        _copy(rows[:size, i], hidden[i])
        _copy(rows[size : size + columns, i], inputs[i])
    _copy(rows[size + columns], bias_inputs)
    _copy(rows[size + columns + 1], bias_hidden)
    _copy(last[:size], head[0])
    bias_head[0] = last[size]


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _step(u: Array, rows: Array, gates: Array, before: Array, cell: Array, tanh: Array, hidden: Array) -> None:
    """Take one step of the LSTM: write the four gates [4H], the cell, its tanh and the new h, each [H]."""
    size = cell.size
    gates[:] = 0
    for k in range(0, u.size, 4):
        first, second, third, fourth = u[k], u[k + 1], u[k + 2], u[k + 3]
        for i in range(gates.size):
            gates[i] += first * rows[k, i] + second * rows[k + 1, i] + third * rows[k + 2, i] + fourth * rows[k + 3, i]
    for i in range(size):
        keep, forget = _sigmoid(gates[i]), _sigmoid(gates[size + i])
        new, output = _tanh(gates[2 * size + i]), _sigmoid(gates[3 * size + i])
        cell[i] = forget * before[i] + keep * new
        tanh[i] = _tanh(cell[i])
        hidden[i] = output * tanh[i]
        gates[i], gates[size + i], gates[2 * size + i], gates[3 * size + i] = keep, forget, new, output


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _step_back(gates: Array, before: Array, tanh: Array, d_hidden: Array, d_cell: Array, d_gates: Array) -> None:
    """From the gradient of h and of the cell, write that of the gates before their sigmoid or tanh; update d_cell."""
    size = tanh.size
    one = type(tanh[0])(1)
    for i in range(size):
        keep, forget, new, output = gates[i], gates[size + i], gates[2 * size + i], gates[3 * size + i]
        d_cell_now = d_cell[i] + d_hidden[i] * output * (one - tanh[i] * tanh[i])
        d_gates[i] = d_cell_now * new * keep * (one - keep)
        d_gates[size + i] = d_cell_now * before[i] * forget * (one - forget)
        d_gates[2 * size + i] = d_cell_now * keep * (one - new * new)
        d_gates[3 * size + i] = d_hidden[i] * tanh[i] * output * (one - output)
        d_cell[i] = d_cell_now * forget


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _dot(left: Array, right: Array) -> float:
    total = type(left[0])(0)
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _add_four_dots(rows: Array, first: int, vector: Array, total: Array) -> None:
    """Add rows[i] @ vector to total[i] for four rows: the vector is then read a quarter as often."""
    zero = type(vector[0])(0)
    sum0, sum1, sum2, sum3 = zero, zero, zero, zero
    for i in range(vector.size):
        sum0 += rows[first, i] * vector[i]
        sum1 += rows[first + 1, i] * vector[i]
        sum2 += rows[first + 2, i] * vector[i]
        sum3 += rows[first + 3, i] * vector[i]
    total[first] += sum0
    total[first + 1] += sum1
    total[first + 2] += sum2
    total[first + 3] += sum3


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _sum_squares(values: Array) -> float:
    total = 0.0
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _sum_outer(left: Array, right: Array, total: Array) -> None:
    """Write the sum over the steps of left[t] x right[t]; the steps come in fours, the columns of left in twos."""
    total[:] = 0
    for k in range(0, left.shape[1], 2):
        for t in range(0, left.shape[0], 4):
            a0, a1, a2, a3 = left[t, k], left[t + 1, k], left[t + 2, k], left[t + 3, k]
            b0, b1, b2, b3 = left[t, k + 1], left[t + 1, k + 1], left[t + 2, k + 1], left[t + 3, k + 1]
            for i in range(right.shape[1]):
                r0, r1, r2, r3 = right[t, i], right[t + 1, i], right[t + 2, i], right[t + 3, i]
                total[k, i] += a0 * r0 + a1 * r1 + a2 * r2 + a3 * r3
                total[k + 1, i] += b0 * r0 + b1 * r1 + b2 * r2 + b3 * r3


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _forward(inputs: Array, targets: Array, rows: Array, last: Array, buffers: Arrays) -> float:
    """Go through a window and return its sum of squared errors."""
    u, gates, cells, tanhs, hiddens, d_outputs, _d_gates, _d_hidden, _d_cell = buffers
    size = tanhs.shape[1]
    taken = inputs.shape[0]
    squared_errors = 0.0
    for t in range(taken):
        _copy(hiddens[t, :size], u[t])
        _copy(inputs[t], u[t, size:])
        _step(u[t], rows, gates[t], cells[t], cells[t + 1], tanhs[t], hiddens[t + 1])
        error = _dot(last, hiddens[t + 1]) - targets[t, 0]
        d_outputs[t] = error * type(error)(2 / taken)
        squared_errors += np.float64(error) * np.float64(error)
    return squared_errors


@njit(fastmath=FAST, error_model="numpy", forceinline=True)
def _backward(taken: int, rows: Array, last: Array, buffers: Arrays) -> None:
    """Go back through the window and write the gradient of the gates of every step."""
    _u, gates, cells, tanhs, _hiddens, d_outputs, d_gates, d_hidden, d_cell = buffers
    size = tanhs.shape[1]
    d_cell[:] = 0
    d_gates[taken:] = 0
    for t in range(taken - 1, -1, -1):
        for i in range(size):
            d_hidden[i] = d_outputs[t] * last[i]
        if t < taken - 1:
            for i in range(0, size, 4):  # may end in the rows that follow; d_hidden is as long as they are
                _add_four_dots(rows, i, d_gates[t + 1], d_hidden)
        _step_back(gates[t], cells[t], tanhs[t], d_hidden, d_cell, d_gates[t])


@njit(error_model="numpy", forceinline=True)
def _make_buffers(columns: int, size: int, window: int, like: Array) -> Arrays:
    """Return the arrays that _forward and _backward work in; those of _sum_outer have steps in multiples of four."""
    num_rows, steps, real = (size + columns + 5) // 4 * 4, (window + 3) // 4 * 4, like.dtype
    u = np.zeros((steps, num_rows), real)
    u[:, size + columns : size + columns + 2] = 1
    hiddens = np.ones((window + 1, size + 1), real)  # and the 1 for the bias of the head
    return (
        u,
        np.empty((window, 4 * size), real),  # gates
        np.empty((window + 1, size), real),  # cells
        np.empty((window, size), real),  # tanhs
        hiddens,
        np.empty(window, real),  # d_outputs
        np.zeros((steps, 4 * size), real),  # d_gates
        np.zeros(num_rows, real),  # d_hidden
        np.empty(size, real),  # d_cell
    )


@njit(fastmath=FAST, error_model="numpy", nogil=True)
def train(
    course: Any, weights: Arrays, means: Arrays, squares: Arrays, state: Arrays, step: Array, adam: Any, sums: Array
) -> int:
    """Train on a stretch and return how many updates were applied; all that is given is changed in place."""
    inputs, targets, start, stop, window = course
    rates, decay_mean, decay_square, epsilon, max_norm = adam
    real, columns, size = inputs.dtype.type, inputs.shape[1], state[0].size
    buffers = _make_buffers(columns, size, window, inputs)
    u, _gates, cells, _tanhs, hiddens, d_outputs, d_gates, _d_hidden, _d_cell = buffers
    rows, last = _pack(weights, u.shape[1])
    rows_mean, last_mean = _pack(means, u.shape[1])
    rows_square, last_square = _pack(squares, u.shape[1])
    gradient, last_gradient = np.empty_like(rows), np.empty_like(last)
    _copy(state[0], hiddens[0])
    _copy(state[1], cells[0])

    done = 0
    for first in range(start, stop, window):
        taken = min(window, stop - first)
        if first == 0:  # only an epoch starts afresh
            hiddens[0, :size] = 0
            cells[0] = 0
        squared_errors = _forward(inputs[first : first + taken], targets[first : first + taken], rows, last, buffers)
        _backward(taken, rows, last, buffers)
        if window == 1:  # each gradient is an outer product of two vectors, so its norm is the product of theirs
            norm = _sum_squares(d_gates[0]) * _sum_squares(u[0])
            norm += np.float64(d_outputs[0]) ** 2 * _sum_squares(hiddens[1])
        else:
            _sum_outer(u, d_gates, gradient)
            last_gradient[:] = 0
            for t in range(taken):
                for i in range(size + 1):
                    last_gradient[i] += d_outputs[t] * hiddens[t + 1, i]
            norm = _sum_squares(gradient.ravel()) + _sum_squares(last_gradient)
        if not (np.isfinite(real(norm)) and np.isfinite(real(squared_errors))):
            break
        norm = np.sqrt(norm)
        clipped = 0 < max_norm < norm
        clip = real(min(1.0, max_norm / (norm + 1e-6)) if clipped else 1.0)

        step[0] += 1
        factors = (
            real(rates[done] / (1 - decay_mean ** step[0])),
            real(1 - decay_mean),
            real(decay_square),
            real(1 - decay_square),
            real(1 / np.sqrt(1 - decay_square ** step[0])),
            real(epsilon),
        )
        if window == 1:
            for k in range(size + columns + 2):
                _adam(rows[k], rows_mean[k], rows_square[k], d_gates[0], clip * u[0, k], factors)
            _adam(last, last_mean, last_square, hiddens[1], clip * d_outputs[0], factors)
        else:
            _adam(rows.ravel(), rows_mean.ravel(), rows_square.ravel(), gradient.ravel(), clip, factors)
            _adam(last, last_mean, last_square, last_gradient, clip, factors)
        _copy(hiddens[taken], hiddens[0])
        _copy(cells[taken], cells[0])
        done += 1
        sums[0] += squared_errors
        sums[1] += taken
        sums[2] += norm
        sums[3] += clipped
        sums[4] += 1

    _unpack(rows, last, weights)
    _unpack(rows_mean, last_mean, means)
    _unpack(rows_square, last_square, squares)
    _copy(hiddens[0, :size], state[0])
    _copy(cells[0], state[1])
    return done


with contextlib.suppress(RuntimeError):  # where no folder can be written each process compiles for itself
    train.enable_caching()
