"""ONNX models in: read a file, run it with torch, capture it as a Program."""
