package verdict

import (
	"fmt"
	"net/netip"
	"sort"
	"strings"

	"github.com/gaissmai/bart"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Peer is the other end of a connection as the enforcing end sees it.
type Peer struct {
	ID   spiffeid.ID // zero: no identity (plaintext at ingress, no pod at egress)
	Addr netip.Addr
	Name string // how texts call it, for example "shop/web-0"; empty: its ID or address
}

func (p Peer) String() string {
	switch {
	case p.Name != "":
		return p.Name
	case !p.ID.IsZero():
		return p.ID.String()
	}
	return p.Addr.String()
}

// Decision is a verdict with its reason.
type Decision struct {
	Allowed bool
	Reason  Reason
}

// Evaluator answers for one Table. It is read-only and safe for concurrent use.
type Evaluator struct {
	table  *Table
	direct string // "ingress" or "egress"
	mode   Mode
	spans  [SCTP + 1][]span
	blocks []peerIndex
}

type span struct {
	PortRange
	block int
}

type peerIndex struct {
	ids        map[spiffeid.ID]*identityIndex
	identified *bart.Table[Verdict]
	anonymous  *bart.Table[Verdict]
}

type identityIndex struct {
	verdict   Verdict
	addresses *bart.Table[Verdict]
}

// NewIngress returns the evaluator of a subject's ingress.
func NewIngress(v *Verdicts) *Evaluator { return newEvaluator(v, &v.Ingress, "ingress") }

// NewEgress returns the evaluator of a subject's egress.
func NewEgress(v *Verdicts) *Evaluator { return newEvaluator(v, &v.Egress, "egress") }

func newEvaluator(v *Verdicts, t *Table, direction string) *Evaluator {
	e := &Evaluator{table: t, direct: direction, mode: v.Mode, blocks: make([]peerIndex, len(t.Blocks))}
	for i := range t.Blocks {
		b := &t.Blocks[i]
		for _, r := range b.Ports {
			e.spans[b.Protocol] = append(e.spans[b.Protocol], span{r, i})
		}
		x := &e.blocks[i]
		x.ids = make(map[spiffeid.ID]*identityIndex, len(b.Peers.ByIdentity))
		for _, id := range b.Peers.ByIdentity {
			ix := &identityIndex{verdict: id.Verdict}
			if len(id.Addresses) > 0 {
				ix.addresses = trie(id.Addresses)
			}
			x.ids[id.ID] = ix
		}
		x.identified, x.anonymous = trie(b.Peers.Identified), trie(b.Peers.Anonymous)
	}
	for _, s := range e.spans {
		sort.Slice(s, func(i, j int) bool { return s[i].First < s[j].First })
	}
	return e
}

func trie(prefixes []Prefix) *bart.Table[Verdict] {
	t := new(bart.Table[Verdict])
	for _, p := range prefixes {
		t.Insert(p.Prefix, p.Verdict)
	}
	return t
}

// Decide says whether a peer may talk to the subject (ingress) or be talked to by it (egress) on a port: the subject's own port
// at ingress, the peer's at egress. A denial names the rule that came nearest.
func (e *Evaluator) Decide(proto Protocol, port uint16, peer Peer) Decision {
	peer.Addr = peer.Addr.Unmap()
	d := e.decide(proto, port, peer)
	d.Reason.Direction = e.direct
	return d
}

func (e *Evaluator) decide(proto Protocol, port uint16, peer Peer) Decision {
	if v, listed := e.lookup(proto, port, peer); listed {
		d := Decision{Allowed: v.Allow, Reason: e.table.Reasons[v.Reason]}
		if !d.Allowed {
			if near, ok := e.nearest(proto, port, peer); ok && d.Reason.Policy == "" {
				d.Reason = near
			}
		}
		return d
	}
	if near, ok := e.nearest(proto, port, peer); ok {
		return Decision{Reason: near}
	}
	return Decision{Reason: e.miss(proto, port, peer)}
}

func (e *Evaluator) lookup(proto Protocol, port uint16, peer Peer) (v Verdict, listed bool) {
	if int(proto) >= len(e.spans) {
		return Verdict{}, false
	}
	s := e.spans[proto]
	i := sort.Search(len(s), func(i int) bool { return s[i].Last >= port })
	if i == len(s) || s[i].First > port {
		return Verdict{}, false
	}
	return e.blocks[s[i].block].lookup(peer)
}

func (x *peerIndex) lookup(peer Peer) (v Verdict, listed bool) {
	if peer.ID.IsZero() {
		return x.anonymous.Lookup(peer.Addr)
	}
	if id, ok := x.ids[peer.ID]; ok {
		if id.addresses != nil {
			if v, ok := id.addresses.Lookup(peer.Addr); ok {
				return v, true
			}
		}
		return id.verdict, true
	}
	return x.identified.Lookup(peer.Addr)
}

// nearest finds a rule that admits the peer on other ports.
func (e *Evaluator) nearest(proto Protocol, port uint16, peer Peer) (Reason, bool) {
	for i := range e.table.Blocks {
		v, listed := e.blocks[i].lookup(peer)
		if !listed || !v.Allow {
			continue
		}
		r := e.table.Reasons[v.Reason]
		if r.Policy == "" {
			continue
		}
		ports := ""
		for _, rule := range e.table.Rules {
			if rule.Policy == r.Policy && rule.Rule == r.Rule {
				ports = rule.Ports
			}
		}
		r.Nearest = true
		r.Text = fmt.Sprintf("peer %s matches %s of %s, but port %d/%s is not %s", peer, r.Rule, r.Policy, port, proto, ports)
		return r, true
	}
	return Reason{}, false
}

// miss words a denial by isolation: which policies isolate and what they would admit.
func (e *Evaluator) miss(proto Protocol, port uint16, peer Peer) Reason {
	t := e.table
	if e.direct == "ingress" && e.mode == Strict && peer.ID.IsZero() {
		return Reason{Text: fmt.Sprintf("plaintext: %s shows no identity, and a strict workload accepts that only from what an ipBlock names outside the pod network", peer)}
	}
	if len(t.Isolating) == 0 {
		return Reason{Text: fmt.Sprintf("nothing admits %s on port %d/%s", peer, port, proto)}
	}
	var onPort, all []string
	policy, rule := t.Isolating[0], ""
	for _, r := range t.Rules {
		text := fmt.Sprintf("%s of %s admits %s on %s", r.Rule, r.Policy, r.Peers, r.Ports)
		all = append(all, text)
		if e.admitsSomebody(r, proto, port) {
			if len(onPort) == 0 {
				policy, rule = r.Policy, r.Rule
			}
			onPort = append(onPort, text)
		}
	}
	who := fmt.Sprintf("isolated for %s by %s", e.direct, join(t.Isolating))
	switch {
	case len(onPort) > 0:
		return Reason{Policy: policy, Rule: rule, Text: fmt.Sprintf("%s: %s, and %s is not among them", who, join(onPort), peer)}
	case len(all) > 0:
		return Reason{Policy: policy, Rule: rule, Text: fmt.Sprintf("%s: %s; none admits port %d/%s", who, join(all), port, proto)}
	}
	return Reason{Policy: policy, Rule: rule, Text: who + ", which has no rule: nothing is admitted"}
}

// admitsSomebody reports whether any entry for the port has its reason in the rule.
func (e *Evaluator) admitsSomebody(r Rule, proto Protocol, port uint16) bool {
	is := func(v Verdict) bool {
		x := e.table.Reasons[v.Reason]
		return v.Allow && x.Policy == r.Policy && x.Rule == r.Rule
	}
	for i := range e.table.Blocks {
		b := &e.table.Blocks[i]
		if b.Protocol != proto || !covers(b.Ports, port) {
			continue
		}
		for _, id := range b.Peers.ByIdentity {
			if is(id.Verdict) {
				return true
			}
			for _, p := range id.Addresses {
				if is(p.Verdict) {
					return true
				}
			}
		}
		for _, list := range [][]Prefix{b.Peers.Identified, b.Peers.Anonymous} {
			for _, p := range list {
				if is(p.Verdict) {
					return true
				}
			}
		}
	}
	return false
}

func covers(ranges []PortRange, port uint16) bool {
	for _, r := range ranges {
		if r.First <= port && port <= r.Last {
			return true
		}
	}
	return false
}

// join lists at most three and counts the rest.
func join(s []string) string {
	if len(s) > 3 {
		return strings.Join(s[:3], ", ") + fmt.Sprintf(" and %d more", len(s)-3)
	}
	return strings.Join(s, ", ")
}
