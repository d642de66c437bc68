// Package identity says who a workload is.
//
// An identity is what interchangeable pods share: the namespace, the service account and the pod's labels without the
// volatile ones. Its name is a SPIFFE ID,
//
//	spiffe://<trust domain>/ns/<namespace>/sa/<service account>/labels/<digest>
//
// so that it travels in the X.509-SVID of every mTLS connection and a new replica is known everywhere by its first packet.
// Code passes identities as [spiffeid.ID], never as strings.
package identity

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Workload is what the identity of a pod is made of.
type Workload struct {
	Namespace      string
	ServiceAccount string            // empty means "default", as in the Kubernetes API
	Labels         map[string]string // all labels of the pod; ID leaves the volatile ones out
}

// VolatileLabels are the label keys that differ between interchangeable pods, because a Kubernetes controller writes one value
// per pod or per revision. They take no part in the identity unless a configuration says otherwise.
func VolatileLabels() []string {
	return []string{
		"apps.kubernetes.io/pod-index",
		"batch.kubernetes.io/controller-uid",
		"batch.kubernetes.io/job-completion-index",
		"batch.kubernetes.io/job-name",
		"controller-revision-hash",
		"controller-uid",
		"job-name",
		"pod-template-generation",
		"pod-template-hash",
		"statefulset.kubernetes.io/pod-name",
	}
}

// Namer names workloads in one trust domain.
type Namer struct {
	trustDomain spiffeid.TrustDomain
	volatile    map[string]bool
}

// NewNamer returns the Namer of a trust domain that leaves the given label keys out of the identity.
func NewNamer(td spiffeid.TrustDomain, volatile []string) *Namer {
	n := &Namer{trustDomain: td, volatile: make(map[string]bool, len(volatile))}
	for _, k := range volatile {
		n.volatile[k] = true
	}
	return n
}

// TrustDomain returns the trust domain in which the Namer names workloads.
func (n *Namer) TrustDomain() spiffeid.TrustDomain { return n.trustDomain }

// Volatile reports whether a label key takes no part in the identity.
func (n *Namer) Volatile(key string) bool { return n.volatile[key] }

// Stable returns the labels that take part in the identity, as a new map.
func (n *Namer) Stable(labels map[string]string) map[string]string {
	stable := make(map[string]string, len(labels))
	for k, v := range labels {
		if !n.volatile[k] {
			stable[k] = v
		}
	}
	return stable
}

// ID returns the SPIFFE ID of a workload. It fails where the namespace or the service account cannot stand in a SPIFFE path
// (SPIFFE-ID specification, section 2.2); Kubernetes names always can.
func (n *Namer) ID(w Workload) (spiffeid.ID, error) {
	sa := w.ServiceAccount
	if sa == "" {
		sa = "default"
	}
	id, err := spiffeid.FromSegments(n.trustDomain, "ns", w.Namespace, "sa", sa, "labels", n.digest(w.Labels))
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("identity of a pod in namespace %q with service account %q: %w", w.Namespace, sa, err)
	}
	return id, nil
}

// digest is 128 bits of SHA-256 over the stable labels in key order. Keys and values cannot hold '=' or a newline
// (Kubernetes label syntax), so no two label sets are written alike; the length prefixes keep that true for any input.
func (n *Namer) digest(labels map[string]string) string {
	keys := make([]string, 0, len(labels))
	for k := range labels {
		if !n.volatile[k] {
			keys = append(keys, k)
		}
	}
	sort.Strings(keys)
	b := make([]byte, 0, 256)
	for _, k := range keys { // len(k):k=len(v):v\n
		v := labels[k]
		b = append(strconv.AppendInt(b, int64(len(k)), 10), ':')
		b = append(append(b, k...), '=')
		b = append(strconv.AppendInt(b, int64(len(v)), 10), ':')
		b = append(append(b, v...), '\n')
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// ControlPlane returns the SPIFFE ID of the control plane of a trust domain. It is none that a workload can have.
func ControlPlane(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "mantlet", "control-plane")
}

// Parts are the readable pieces of a workload's SPIFFE ID.
type Parts struct {
	Namespace      string
	ServiceAccount string
	Digest         string
}

// Parse takes a workload's SPIFFE ID apart. It fails for any ID that [Namer.ID] does not make.
func Parse(id spiffeid.ID) (Parts, error) {
	seg := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(seg) != 6 || seg[0] != "ns" || seg[2] != "sa" || seg[4] != "labels" || len(seg[5]) != 32 {
		return Parts{}, fmt.Errorf("SPIFFE ID %q: not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>/labels/<digest>", id)
	}
	return Parts{Namespace: seg[1], ServiceAccount: seg[3], Digest: seg[5]}, nil
}
