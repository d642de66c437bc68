// Package verdicts holds what the pod's policy decides, for those in the agent who have to decide by it.
//
//	control plane ──mantlet.v1.Verdicts──► relay ──Apply──► Holder ──Current, Changed──► packet policy, open connections
//
// The last verdicts that could be read stay in force, whatever comes after them and however long the control plane is away.
package verdicts

import (
	"sync"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// Current is a policy in force. It is read-only and safe for concurrent use.
type Current struct {
	Verdicts *verdict.Verdicts
	Ingress  *verdict.Evaluator
	Egress   *verdict.Evaluator
}

// Holder holds the verdicts in force. It is safe for concurrent use.
type Holder struct {
	mu      sync.Mutex
	current *Current
	refused error // why the last that came is not in force
	changed chan struct{}
}

// New returns a Holder that holds nothing yet.
func New() *Holder { return &Holder{changed: make(chan struct{})} }

// Apply puts verdicts in force that wire.Marshal wrote, or says why they cannot be read; then those before them stay.
func (h *Holder) Apply(b []byte) error {
	v, err := wire.Unmarshal(b)
	var next *Current
	if err == nil {
		next = &Current{Verdicts: v, Ingress: verdict.NewIngress(v), Egress: verdict.NewEgress(v)}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refused = err
	if next != nil {
		h.current = next
	}
	close(h.changed)
	h.changed = make(chan struct{})
	return err
}

// Current returns the verdicts in force; nil: none have come, and nobody may be admitted on their account.
func (h *Holder) Current() *Current {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current
}

// Changed returns a channel that is closed at the next Apply. Take it before asking, so that no change is missed.
func (h *Holder) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// Missing says why no verdicts are in force, or is empty where there are some.
func (h *Holder) Missing() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.current != nil:
		return ""
	case h.refused != nil:
		return "no verdicts: the agent cannot read those that it was sent: " + h.refused.Error()
	}
	return "no verdicts from the control plane"
}
