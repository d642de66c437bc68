package verdict

import (
	"fmt"
	"net/netip"
	"slices"
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

// few is up to how many entries a list is looked through instead of indexed: most lists are that short, and the indexes of a hundred thousand
// subjects would take more memory than all that they index.
const few = 8

type peerIndex struct {
	ids        identityIndex
	identified prefixIndex
	anonymous  prefixIndex
}

// identityIndex finds a peer by its identity.
type identityIndex struct {
	list  []Identity
	index map[spiffeid.ID]int         // into list; nil: few
	tries map[spiffeid.ID]prefixIndex // of the Addresses of those that have more than few
}

// prefixIndex finds the longest prefix that holds an address.
type prefixIndex struct {
	list []Prefix
	trie *bart.Table[Verdict] // nil: few
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
		e.blocks[i] = peerIndex{newIdentityIndex(b.Peers.ByIdentity), newPrefixIndex(b.Peers.Identified), newPrefixIndex(b.Peers.Anonymous)}
	}
	for _, s := range e.spans {
		sort.Slice(s, func(i, j int) bool { return s[i].First < s[j].First })
	}
	return e
}

func newIdentityIndex(list []Identity) identityIndex {
	x := identityIndex{list: list}
	if len(list) > few {
		x.index = make(map[spiffeid.ID]int, len(list))
	}
	for i := range list {
		id := &list[i]
		if x.index != nil {
			x.index[id.ID] = i
		}
		if len(id.Addresses) > few {
			if x.tries == nil {
				x.tries = map[spiffeid.ID]prefixIndex{}
			}
			x.tries[id.ID] = newPrefixIndex(id.Addresses)
		}
	}
	return x
}

func (x *identityIndex) find(id spiffeid.ID) *Identity {
	if x.index != nil {
		if i, ok := x.index[id]; ok {
			return &x.list[i]
		}
		return nil
	}
	for i := range x.list {
		if x.list[i].ID == id {
			return &x.list[i]
		}
	}
	return nil
}

// lookup is the verdict on a peer, if the list has it.
func (x *identityIndex) lookup(peer Peer) (v Verdict, listed bool) {
	id := x.find(peer.ID)
	if id == nil {
		return Verdict{}, false
	}
	addresses, ok := x.tries[peer.ID]
	if !ok {
		addresses = prefixIndex{list: id.Addresses}
	}
	if v, ok := addresses.lookup(peer.Addr); ok {
		return v, true
	}
	return id.Verdict, true
}

func newPrefixIndex(list []Prefix) prefixIndex {
	x := prefixIndex{list: list}
	if len(list) > few {
		x.trie = new(bart.Table[Verdict])
		for _, p := range list {
			x.trie.Insert(p.Prefix, p.Verdict)
		}
	}
	return x
}

func (x *prefixIndex) lookup(a netip.Addr) (v Verdict, found bool) {
	if x.trie != nil {
		return x.trie.Lookup(a)
	}
	a = a.WithZone("") // a prefix holds no address with one; a trie does not look at it
	longest := -1
	for i := range x.list {
		if p := &x.list[i]; p.Prefix.Bits() >= longest && p.Prefix.Contains(a) {
			longest, v, found = p.Prefix.Bits(), p.Verdict, true
		}
	}
	return v, found
}

// Decide says whether a peer may talk to the subject (ingress) or be talked to by it (egress) on a port: the subject's own port
// at ingress, the peer's at egress. A denial names the rule that came nearest.
func (e *Evaluator) Decide(proto Protocol, port uint16, peer Peer) Decision {
	peer.Addr = peer.Addr.Unmap()
	d := e.decide(proto, port, peer)
	d.Reason.Direction = e.direct
	return d
}

// Allows is Decide without the reason, which takes longer to word than the decision to make.
func (e *Evaluator) Allows(proto Protocol, port uint16, peer Peer) bool {
	peer.Addr = peer.Addr.Unmap()
	v, listed := e.lookup(proto, port, peer)
	return listed && v.Allow
}

func (e *Evaluator) decide(proto Protocol, port uint16, peer Peer) Decision {
	if v, listed := e.lookup(proto, port, peer); listed && (v.Allow || e.table.Reasons[v.Reason] != Unlisted) {
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
	x := e.at(proto, port)
	if x == nil {
		return Verdict{}, false
	}
	return x.lookup(peer)
}

// at is who is listed at a port; nil: nobody is.
func (e *Evaluator) at(proto Protocol, port uint16) *peerIndex {
	if int(proto) >= len(e.spans) {
		return nil
	}
	s := e.spans[proto]
	i := sort.Search(len(s), func(i int) bool { return s[i].Last >= port })
	if i == len(s) || s[i].First > port {
		return nil
	}
	return &e.blocks[s[i].block]
}

func (x *peerIndex) lookup(peer Peer) (v Verdict, listed bool) {
	if peer.ID.IsZero() {
		return x.anonymous.lookup(peer.Addr)
	}
	if v, ok := x.ids.lookup(peer); ok {
		return v, true
	}
	return x.identified.lookup(peer.Addr)
}

// Anywhere reports whether a peer is judged alike wherever in its address family it is: no address that the evaluator knows has a part in the decision.
// False: that cannot be said.
func (e *Evaluator) Anywhere(proto Protocol, port uint16, id spiffeid.ID) bool {
	x := e.at(proto, port)
	return x == nil || x.anywhere(id)
}

func (x *peerIndex) anywhere(id spiffeid.ID) bool {
	list := x.identified.list
	if listed := x.ids.find(id); listed != nil {
		list = listed.Addresses
	} else if id.IsZero() {
		list = x.anonymous.list
	}
	return !slices.ContainsFunc(list, func(p Prefix) bool { return p.Prefix.Bits() > 0 })
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
