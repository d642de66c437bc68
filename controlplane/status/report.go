package status

import "time"

// Path is where a replica serves its Report, as JSON.
const Path = "/v1/status"

// Report is what one replica of the control plane knows. Lists are sorted by name. A zero time is left out.
type Report struct {
	Replica     string      `json:"replica"`
	Time        time.Time   `json:"time"` // of the report
	TrustDomain string      `json:"trustDomain"`
	Roots       []time.Time `json:"roots"` // when the trusted roots end
	// Authority tells by which certificate is signed and which roots are trusted (ca.CA.Fingerprint).
	Authority string `json:"authority,omitempty"`
	// Unbundled are the namespaces whose trust bundle, by which new sidecars begin, is another one still.
	Unbundled  []string    `json:"unbundled,omitempty"`
	Retired    Retired     `json:"retired"`
	Namespaces []Namespace `json:"namespaces"`
	Pods       []Pod       `json:"pods"`
	Policies   []Policy    `json:"policies"`
}

// Retired is what a replica knows of identities that running pods no longer have.
type Retired struct {
	Identities int       `json:"identities"` // refused from the addresses of pods that had them
	Bindings   []Binding `json:"bindings,omitempty"`
	Problem    string    `json:"problem,omitempty"` // why they are not on record for other replicas, or what was broken there
}

// Binding says that for a while the identities of a namespace count from addresses of pods that have them only.
type Binding struct {
	Namespace string    `json:"namespace,omitempty"` // empty: of all
	Until     time.Time `json:"until"`
	Why       string    `json:"why"`
}

// Namespace is one in which there are pods or policies.
type Namespace struct {
	Name string `json:"name"`
	Mode string `json:"mode"` // permissive or strict
	// Exempt says that its pods get no sidecars, whatever they ask for: Mantlet's own and the cluster's own, which must not wait for Mantlet.
	Exempt bool `json:"exempt,omitempty"`
	// Required says that it refuses new pods without sidecar (its label mantlet.dev/inject: required).
	Required bool `json:"required,omitempty"`
}

// Pod is one to which policy applies: not of the node's network, and not ended.
type Pod struct {
	Name    string   `json:"name"` // "namespace/name"
	UID     string   `json:"uid,omitempty"`
	Started bool     `json:"started,omitempty"` // it has an address
	Sidecar *Sidecar `json:"sidecar,omitempty"` // nil: it has none
}

// Sidecar is what a replica knows of one. That it is not connected to this one does not mean that it is not to another.
type Sidecar struct {
	Connected   bool      `json:"connected"`
	InForce     bool      `json:"inForce"` // connected, and it has confirmed everything that it should hold
	Since       time.Time `json:"since,omitzero"`
	LastAck     time.Time `json:"lastAck,omitzero"`
	Certificate time.Time `json:"certificate,omitzero"` // when that which this replica has signed last ends
	// Given is when this replica has signed for it last, and Current says that it has what Authority gives, roots included, and has had it for a moment.
	Given   time.Time  `json:"given,omitzero"`
	Current bool       `json:"current,omitempty"`
	Waiting []Resource `json:"waiting,omitempty"` // not confirmed yet
	Refused []Refusal  `json:"refused,omitempty"` // NACKed
}

// Resource is an xDS resource, its type the last part of the type URL.
type Resource struct {
	Type string `json:"type"`
	Name string `json:"name"`
}

// Refusal is a NACK.
type Refusal struct {
	Resource
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

// Policy is a NetworkPolicy as a replica holds it.
type Policy struct {
	Name       string    `json:"name"` // "namespace/name"
	UID        string    `json:"uid,omitempty"`
	Generation int64     `json:"generation,omitempty"`
	Created    time.Time `json:"created,omitzero"`
	Pods       []string  `json:"pods"` // that it selects
	Problems   []string  `json:"problems,omitempty"`
}
