"""All operators that are measured, the costliest in a step first: a run that is cut off has measured the costliest."""

from benchmarks.operators.attention import SLIDING_WINDOW_ATTENTION
from benchmarks.operators.decode import DECODE_ATTENTION
from benchmarks.operators.head import LINEAR_LOG_PROB
from benchmarks.operators.operator import Operator
from benchmarks.operators.optimizer import ADAMW, GRADIENT_NORM
from benchmarks.operators.tokenwise import ADD_RMS_NORM, EMBEDDING, RMS_NORM, ROTARY, SWIGLU, SWIGLU_BACKWARD

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        SLIDING_WINDOW_ATTENTION,
        LINEAR_LOG_PROB,
        SWIGLU,
        SWIGLU_BACKWARD,
        RMS_NORM,
        ADD_RMS_NORM,
        ADAMW,
        GRADIENT_NORM,
        EMBEDDING,
        ROTARY,
        DECODE_ATTENTION,
    )
}
