"""What operators see: Prometheus metrics, OpenTelemetry traces, and one log line a request."""
