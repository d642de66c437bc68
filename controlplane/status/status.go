package status

import (
	"slices"
	"strings"
	"time"
)

// State is how far a pod is, or a policy, or all of them.
type State string

// The states.
const (
	InForce       State = "in force"
	NotEverywhere State = "not everywhere" // of a policy, or of all: in force in some pods only, or in none
	Waiting       State = "waiting"        // its sidecar has not confirmed everything yet
	Refused       State = "refused"        // its sidecar NACKed something; what it had before stays in force there
	NotConnected  State = "not connected"  // to none of the replicas; it enforces what it was told last
	NoSidecar     State = "no sidecar"
	Exempt        State = "exempt"  // it has no sidecar, and is in a namespace whose pods get none: somebody else has to enforce what it says there
	Unknown       State = "unknown" // connected to none of the replicas that answered, and some did not
)

// Status is the whole. Lists are sorted by name.
type Status struct {
	State      State             `json:"state"` // in force, not everywhere, or unknown
	Replicas   []ReplicaStatus   `json:"replicas"`
	Bindings   []Binding         `json:"bindings,omitempty"` // by namespace, each with its latest end
	Namespaces []NamespaceStatus `json:"namespaces"`
	Policies   []PolicyStatus    `json:"policies"`
	Sidecars   []SidecarStatus   `json:"sidecars"`
}

// ReplicaStatus is one replica of the control plane.
type ReplicaStatus struct {
	Name        string      `json:"name"`
	Error       string      `json:"error,omitempty"` // why it was not heard
	TrustDomain string      `json:"trustDomain,omitempty"`
	Sidecars    int         `json:"sidecars"`        // connected to it
	Policies    int         `json:"policies"`        // that it holds
	Roots       []time.Time `json:"roots,omitempty"` // when the roots that it trusts end
	// Authority tells by which certificate it signs and which roots it trusts, and Unbundled which namespaces begin with others still.
	Authority string   `json:"authority,omitempty"`
	Unbundled []string `json:"unbundled,omitempty"`
	Retired   int      `json:"retired"` // identities that it refuses from addresses of pods that had them
	Problem   string   `json:"problem,omitempty"`
}

// NamespaceStatus is how far a namespace's pods are covered.
type NamespaceStatus struct {
	Name     string `json:"name"`
	Mode     string `json:"mode"`
	Exempt   bool   `json:"exempt,omitempty"`   // its pods get no sidecars
	Required bool   `json:"required,omitempty"` // it refuses new pods without sidecar
	Pods     int    `json:"pods"`
	Sidecars int    `json:"sidecars"`
	InForce  int    `json:"inForce"`
	// Missing are the pods without sidecar where it is required: they were there before it was, or while the webhooks were not.
	Missing []string `json:"missing,omitempty"`
}

// PolicyStatus is where a policy is in force.
type PolicyStatus struct {
	Name       string              `json:"name"`
	UID        string              `json:"uid,omitempty"`
	Generation int64               `json:"generation,omitempty"`
	State      State               `json:"state"` // in force, not everywhere, refused (by some sidecar), exempt, or unknown
	Pods       int                 `json:"pods"`  // that it selects
	InForce    int                 `json:"inForce"`
	Elsewhere  map[State][]string  `json:"elsewhere,omitempty"` // the other pods
	Reasons    map[string][]string `json:"reasons,omitempty"`   // why sidecars refused it: the pods, by reason
	Behind     []string            `json:"behind,omitempty"`    // replicas that hold another version: by it they tell their sidecars whom these may reach
	Problems   []string            `json:"problems,omitempty"`  // what is wrong in it, and so closed
}

// SidecarStatus is one sidecar.
type SidecarStatus struct {
	Pod     string `json:"pod"`
	State   State  `json:"state"`
	Replica string `json:"replica,omitempty"` // that it is connected to
	Started bool   `json:"started,omitempty"` // its pod has an address
	Sidecar
}

// In is what a Status says of one namespace. The empty namespace is all.
func (s Status) In(namespace string) Status {
	if namespace == "" {
		return s
	}
	out := Status{Replicas: s.Replicas}
	for _, b := range s.Bindings {
		if b.Namespace == namespace || b.Namespace == "" {
			out.Bindings = append(out.Bindings, b)
		}
	}
	for _, n := range s.Namespaces {
		if n.Name == namespace {
			out.Namespaces = append(out.Namespaces, n)
		}
	}
	for _, p := range s.Policies {
		if namespaceOf(p.Name) == namespace {
			out.Policies = append(out.Policies, p)
		}
	}
	for _, c := range s.Sidecars {
		if namespaceOf(c.Pod) == namespace {
			out.Sidecars = append(out.Sidecars, c)
		}
	}
	out.State = out.judged()
	return out
}

// Heard is how many replicas have answered.
func (s Status) Heard() (n int) {
	for _, r := range s.Replicas {
		if r.Error == "" {
			n++
		}
	}
	return n
}

// judged says what is to be said of all in one word. What is known not to be in force outweighs what is not known.
func (s Status) judged() State {
	if s.Heard() == 0 {
		return Unknown
	}
	var states []State
	for _, n := range s.Namespaces {
		if len(n.Missing) > 0 {
			return NotEverywhere
		}
	}
	for _, p := range s.Policies {
		states = append(states, p.State)
	}
	for _, c := range s.Sidecars {
		states = append(states, c.State)
	}
	all := InForce
	for _, state := range states {
		switch state {
		case InForce, Exempt:
		case Unknown:
			all = Unknown
		default:
			return NotEverywhere
		}
	}
	return all
}

// Policy returns one, by "namespace/name".
func (s Status) Policy(name string) (PolicyStatus, bool) {
	i, ok := slices.BinarySearchFunc(s.Policies, name, func(p PolicyStatus, name string) int { return strings.Compare(p.Name, name) })
	if !ok {
		return PolicyStatus{}, false
	}
	return s.Policies[i], true
}

func namespaceOf(name string) string { return name[:max(0, strings.IndexByte(name, '/'))] }
