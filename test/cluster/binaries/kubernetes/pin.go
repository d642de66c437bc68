//go:build pin

// Package kubernetes is never built: it makes go.mod and go.sum beside it cover the end-to-end suite, which is a test, and so cannot be
// named by a tool directive.
package kubernetes

import _ "k8s.io/kubernetes/test/e2e"
