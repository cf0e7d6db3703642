"""What people and programs talk to: today the command line; the gRPC and REST services come next."""
