"""Front-end processes: gRPC and REST on one asyncio loop, text at the edge, the engine at the other end of a stream."""
