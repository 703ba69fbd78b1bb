"""The guard on a Ray cluster: behind Ray Serve's gRPC ingress. Needs the extra `ray`."""
