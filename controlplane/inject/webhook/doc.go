// Package webhook is the API server's way to package inject: admission webhooks over HTTPS.
//
//	API server ── POST /inject ────────► the pod's namespace ──► inject.Inject ──► patch, refusal, warnings
//	           ── POST /verify ────────► the pod as it will be stored: has nobody undone it since?
//	           ── POST /ephemeral ─────► debugging containers of a pod with a sidecar
//	           ── POST /policy ────────► warnings about a NetworkPolicy; never a refusal
//
// The certificate is the control plane's own, signed by the built-in authority; [Bundle] writes that authority's roots into the webhook
// configurations and keeps them there.
//
// The namespace is read from the API server for every pod, and not from a cache: a cache that is behind would let a pod of a namespace
// that was labelled a moment ago go without a sidecar.
package webhook
