"""What all services share: calls, policies, the stream runner, the server, configuration."""
