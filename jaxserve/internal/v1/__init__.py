"""Stubs of protos/jaxserve/internal/v1; written by `make protos`, never by hand."""
