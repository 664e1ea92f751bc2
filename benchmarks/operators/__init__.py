"""All operators that are measured, first those that a step takes longest for: a run that is cut off leaves their rows."""

from benchmarks.operators.attention import SLIDING_WINDOW_ATTENTION
from benchmarks.operators.decode import DECODE_ATTENTION
from benchmarks.operators.head import LINEAR_LOG_PROB
from benchmarks.operators.operator import Operator
from benchmarks.operators.optimizer import ADAMW, GRADIENT_NORM
from benchmarks.operators.tokenwise import ADD_RMS_NORM, EMBEDDING, NOISY_EMBEDDING, RMS_NORM, ROTARY, SWIGLU, SWIGLU_BACKWARD

OPERATORS: tuple[Operator, ...] = (
    LINEAR_LOG_PROB, SLIDING_WINDOW_ATTENTION, SWIGLU, SWIGLU_BACKWARD, RMS_NORM, ADD_RMS_NORM, ADAMW, GRADIENT_NORM, EMBEDDING,
    NOISY_EMBEDDING, ROTARY, DECODE_ATTENTION,
)  # fmt: skip
