"""Stubs of protos/jaxserve/v1, the public gRPC API; written by `make protos`, never by hand."""
