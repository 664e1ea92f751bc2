"""SentencePiece's model file as protobuf classes. They are made at import time, hidden from a type checker."""

from typing import Any

from sentencepiece import sentencepiece_model_pb2

_protobuf: Any = sentencepiece_model_pb2
ModelProto = _protobuf.ModelProto
TrainerSpec = _protobuf.TrainerSpec
Piece = ModelProto.SentencePiece
