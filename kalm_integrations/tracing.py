"""OpenTelemetry spans of rerankers. Off until it is asked for."""
