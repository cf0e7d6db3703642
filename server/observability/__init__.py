"""What the server tells about itself: metrics, logs, traces, a dashboard and alert rules."""
