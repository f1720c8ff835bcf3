"""The engine of one replica group: a tensor-parallel Llama over N ranks.

Runs with torch alone; imports no ray, grpc or protobuf. `model_parallel.engine` imports no torch either.
"""
