// Package verdict holds the compiled form of all policy that applies to one subject, and the evaluator of that form.
//
//	NetworkPolicies, pods, namespaces ──policy.Compile──► Verdicts ──┬─► xds: Envoy matchers
//	                                                                 ├─► agent: packet policy in nftables, open connections
//	                                                                 └─► Evaluator: simulate, explain, tests
//
// A Verdicts value is plain data: no selectors, no Kubernetes types, nothing to look up elsewhere. Equal policy gives equal
// values, byte for byte, whatever order its inputs came in. Nothing in it is implied: what is not listed is denied.
package verdict

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Protocol is a transport protocol that NetworkPolicy knows.
type Protocol uint8

// The protocols of NetworkPolicyPort.
const (
	TCP Protocol = iota + 1
	UDP
	SCTP
)

// Protocols are all protocols, in the order in which tables list them.
var Protocols = []Protocol{TCP, UDP, SCTP}

// String returns the protocol as Kubernetes writes it.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("Protocol(%d)", uint8(p))
}

// ParseProtocol reads a protocol as Kubernetes writes it; the empty string is TCP (NetworkPolicyPort.protocol).
func ParseProtocol(s string) (Protocol, error) {
	switch s {
	case "", "TCP":
		return TCP, nil
	case "UDP":
		return UDP, nil
	case "SCTP":
		return SCTP, nil
	}
	return 0, fmt.Errorf("protocol %q: not TCP, UDP or SCTP", s)
}

// MarshalText writes the protocol as Kubernetes does.
func (p Protocol) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (p *Protocol) UnmarshalText(b []byte) error {
	v, err := ParseProtocol(string(b))
	*p = v
	return err
}

// Mode says which peers without an identity a subject accepts.
type Mode uint8

const (
	// Permissive subjects match pods without a sidecar by their address.
	Permissive Mode = iota + 1
	// Strict subjects accept plaintext only from the own node and from what an ipBlock names outside the pod network.
	Strict
)

// String returns "permissive" or "strict".
func (m Mode) String() string {
	switch m {
	case Permissive:
		return "permissive"
	case Strict:
		return "strict"
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// ParseMode reads "permissive" or "strict".
func ParseMode(s string) (Mode, error) {
	switch s {
	case "permissive":
		return Permissive, nil
	case "strict":
		return Strict, nil
	}
	return 0, fmt.Errorf("mode %q: not permissive or strict", s)
}

// MarshalText writes the mode as String does.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := ParseMode(string(b))
	*m = v
	return err
}

// Verdicts are all decisions that one subject needs: a set of pods that share an identity and whatever else decides.
type Verdicts struct {
	Subject spiffeid.ID `json:"subject"`
	Mode    Mode        `json:"mode"`
	// Ingress decides by the source of a connection to the subject. At an isolated subject the peer's own egress policy is
	// already part of it.
	Ingress Table `json:"ingress"`
	// Egress decides by the destination of a connection from the subject, after service load balancing: pod address and
	// target port.
	Egress Table `json:"egress"`
}

// Table is one direction.
type Table struct {
	// Isolating names the policies ("namespace/name", sorted) that isolate the subject in this direction. Where there are
	// none the Blocks say in so many words that everything is allowed.
	Isolating []string `json:"isolating,omitempty"`
	// Rules are the rules of the isolating policies, in order of policy and index, for explanations.
	Rules []Rule `json:"rules,omitempty"`
	// Reasons are what the entries below point at.
	Reasons []Reason `json:"reasons"`
	// Blocks are disjoint in (protocol, port) and sorted by protocol and first port. What no block covers is denied.
	Blocks []Block `json:"blocks"`
}

// Rule is one rule of an isolating policy in words.
type Rule struct {
	Policy string `json:"policy"` // "namespace/name"
	Rule   string `json:"rule"`   // "ingress[0]"
	Peers  string `json:"peers"`  // "pods app=api", "ipBlock 10.0.0.0/8 except 10.1.0.0/16", "anyone"
	Ports  string `json:"ports"`  // "5432/TCP", "any port"
}

// Reason says why. Policy and Rule are empty where no policy decided.
type Reason struct {
	Policy string `json:"policy,omitempty"` // "namespace/name"
	Rule   string `json:"rule,omitempty"`   // "ingress[0]"
	Text   string `json:"text"`
	// Nearest marks a denial where Policy and Rule admit this peer on other ports: the nearest miss.
	Nearest bool `json:"nearest,omitempty"`
	// Direction is the table that decided, "ingress" or "egress". Only the Evaluator fills it.
	Direction string `json:"direction,omitempty"`
}

// Unlisted is the reason of an entry that denies as if it were not there: one that is for other addresses of its identity. The Evaluator says what it would
// without the entry.
var Unlisted = Reason{Text: "no rule admits this identity from this address"}

// Block holds the peers of a group of ports that have the same peers.
type Block struct {
	Protocol Protocol    `json:"protocol"`
	Ports    []PortRange `json:"ports"` // sorted, apart from each other, never empty
	Peers    Peers       `json:"peers"`
}

// PortRange is a range of ports, both ends included, 1 ≤ First ≤ Last.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// AllPorts is every port.
var AllPorts = PortRange{First: 1, Last: 65535}

// String writes "5432" or "8000-8080".
func (r PortRange) String() string {
	if r.First == r.Last {
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// ParsePortRange reads what String writes: a port, or two of which the second is not less, with a dash between them.
func ParsePortRange(s string) (PortRange, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || a > b {
		return PortRange{}, fmt.Errorf("%q is not a range of ports such as %s", s, DefaultNodePorts)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}

// Peers decides by who the peer is. A peer with an identity is looked up in ByIdentity and, where that does not list it, by its
// address in Identified. A peer without one is looked up by its address in Anonymous. Whatever is not found is denied.
type Peers struct {
	// ByIdentity is sorted by SPIFFE ID.
	ByIdentity []Identity `json:"byIdentity,omitempty"`
	// Identified and Anonymous are sorted by prefix; the longest prefix that holds the address decides.
	Identified []Prefix `json:"identified,omitempty"`
	Anonymous  []Prefix `json:"anonymous,omitempty"`
}

// Identity is the verdict on one peer identity. Without Addresses the identity alone decides. With them the longest prefix that
// holds the peer's address decides, and an address that none holds gets Verdict, which then denies.
type Identity struct {
	ID        spiffeid.ID `json:"id"`
	Verdict   Verdict     `json:"verdict"`
	Addresses []Prefix    `json:"addresses,omitempty"`
}

// Prefix is the verdict on the peers in a range of addresses. The prefix is masked and never an IPv4-mapped one.
type Prefix struct {
	Prefix  netip.Prefix `json:"prefix"`
	Verdict Verdict      `json:"verdict"`
}

// Verdict is one decision. The zero value denies.
type Verdict struct {
	Allow  bool `json:"allow,omitempty"`
	Reason int  `json:"reason"` // index into Table.Reasons
}
