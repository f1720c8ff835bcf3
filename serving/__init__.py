"""What clients meet: gateway, replica groups as Ray Serve deployments, configuration and command line."""
