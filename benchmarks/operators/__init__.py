"""All operators that are measured, in the order of a forward pass, then the optimizer's."""

from benchmarks.operators.attention import SLIDING_WINDOW_ATTENTION
from benchmarks.operators.head import LINEAR_LOG_PROB
from benchmarks.operators.operator import Operator
from benchmarks.operators.optimizer import ADAMW, GRADIENT_NORM
from benchmarks.operators.tokenwise import ADD_RMS_NORM, EMBEDDING, NOISY_EMBEDDING, RMS_NORM, ROTARY, SWIGLU

OPERATORS: tuple[Operator, ...] = (
    EMBEDDING, NOISY_EMBEDDING, RMS_NORM, ADD_RMS_NORM, ROTARY, SLIDING_WINDOW_ATTENTION, SWIGLU, LINEAR_LOG_PROB,
    GRADIENT_NORM, ADAMW,
)  # fmt: skip
