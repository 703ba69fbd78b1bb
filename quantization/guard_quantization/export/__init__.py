"""From weights to a served artifact: integer arithmetic, the ONNX graph, the sealed folder."""
