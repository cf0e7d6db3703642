"""Help texts of the server's own flags, by panel of `jaxserve serve --help`; every field of ServerSettings has one."""

SERVER_HELP: dict[str, dict[str, str]] = {
    "Addresses": {
        "host": "Address of REST and gRPC; 0.0.0.0 = all",
        "port": "REST; 0 = any free one",
        "grpc_port": "gRPC; 0 = any free one",
        "admin_host": "Address of /metrics and /admin",
        "admin_port": "/metrics and /admin; 0 = any free one",
        "root_path": "Path that a proxy in front of the server strips",
    },
    "Names and access": {
        "served_model_name": "What clients call the model; several: repeat it, or commas; responses carry the first",
        "api_key": "Key that clients must show; several: repeat it, or commas. Others on this machine can read flags: "
        "better JAXSERVE_API_KEY or the file",
        "allowed_origins": "Web pages of these origins may call (CORS), * = any; several: repeat it, or commas",
        "ssl_certfile": "Certificate chain, PEM; REST and gRPC then speak TLS only",
        "ssl_keyfile": "Its key, PEM, unencrypted",
        "ssl_ca_certs": "Clients must show a certificate that one of these signed, PEM",
    },
    "Limits": {
        "max_num_queued_reqs": "Samples that may wait beyond those that run; more are refused",
        "max_num_queued_tokens": "Prompt tokens of all unfinished requests; more are refused",
        "default_timeout": "Seconds a request may take that names no deadline",
        "drain_timeout": "Seconds that running requests get to finish after SIGTERM",
        "slow_reader_timeout": "Seconds after which a client that reads nothing is dropped",
        "sse_keep_alive": "Seconds between comments on a silent event stream",
        "max_body_bytes": "Largest request body, in bytes",
        "header_timeout": "Seconds a client has to send its headers",
        "max_connections": "Open REST connections of a front end",
    },
    "Behaviour": {
        "unknown_params": "Unknown request parameters: error = refuse, warn = ignore and log",
        "playground": "The page at /",
        "frontends": "Front-end processes; they share the ports",
        "in_process": "Engine and front end in one process, for debugging",
    },
    "Logs and metrics": {
        "log_level": "debug, info, warning or error",
        "log_format": "text or json",
        "log_interval": "Seconds between two lines of rates",
        "metrics_prefix": "What metrics' names begin with; vllm fits dashboards made for vLLM",
        "otlp_traces_endpoint": "Where OpenTelemetry traces go, like http://localhost:4318/v1/traces",
    },
}
# What an absent flag means, where the field only says None or nothing
SERVER_DEFAULTS = {
    "served_model_name": "the model's own",
    "api_key": "none needed",
    "allowed_origins": "none",
    "max_num_queued_reqs": "four times those that run, at least 256",
    "max_num_queued_tokens": "no limit",
    "default_timeout": "no limit",
}
