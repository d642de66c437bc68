package relay

import (
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

const (
	// MaxNames bounds the clusters that are known for a pod, allowed or denied, asked for by Envoy or the agent: who asks for more is refused.
	// The control plane takes 4,096 names of all types.
	MaxNames = 4000
	// maxKinds bounds the types that Envoy may name; it names three.
	maxKinds = 16
	// maxUnanswered and maxUnansweredBytes bound what Envoy is sent without answering. It answers each response before it reads the next.
	maxUnanswered      = 1024
	maxUnansweredBytes = 64 << 20
)

// machine is all that the relay knows, and what it does about it. It has no goroutine and no lock: whoever calls it does so one call at
// a time, and carries what it puts out.
type machine struct {
	logger *slog.Logger
	ledger *Ledger
	// tell hands on the answers that have changed; when it returns they are known, or it has waited long enough.
	tell func(map[netip.AddrPort]Verdict)

	kinds map[string]*kind
	envoy *envoySide // nil: it is away
	plane *planeSide // nil: there is no stream
	down  bool       // the control plane cannot be reached; false also while that is being tried for the first time
	why   string     // with down: the reason

	maxNames, maxBytes int // MaxNames and maxUnansweredBytes; tests have less

	nonces uint64
	news   map[netip.AddrPort]Verdict // answers that have changed and were not told yet
	// unserved are destinations that were refused because the control plane could not be reached, until it can be.
	unserved map[netip.AddrPort]bool
}

func newMachine(logger *slog.Logger, ledger *Ledger) *machine {
	return &machine{logger: logger, ledger: ledger, kinds: map[string]*kind{}, news: map[netip.AddrPort]Verdict{}, unserved: map[netip.AddrPort]bool{},
		maxNames: MaxNames, maxBytes: maxUnansweredBytes, tell: func(map[netip.AddrPort]Verdict) {}}
}

func (m *machine) kind(url string) *kind {
	k := m.kinds[url]
	if k == nil {
		k = &kind{url: url, entries: map[string]*entry{}, moved: map[string]bool{}}
		m.kinds[url] = k
	}
	return k
}

func (m *machine) ranked() []*kind {
	return slices.SortedFunc(maps.Values(m.kinds), byRank)
}

func (m *machine) nonce() string {
	m.nonces++
	return "relay-" + strconv.FormatUint(m.nonces, 10)
}

// deliver tells what has changed.
func (m *machine) deliver() {
	if len(m.news) > 0 {
		news := m.news
		m.news = map[netip.AddrPort]Verdict{}
		m.tell(news)
	}
}

// changed draws the consequences of what has changed about an entry.
func (m *machine) changed(e *entry) {
	m.judge(e)
	if e.onDemand() && e.wanted() != e.listed {
		m.move(e)
	}
	if e.onDemand() && e.maybe && e.flight == nil && (!e.wanted() || e.refusal != "" && e.good == nil) {
		// What Envoy may have applied all the same and nobody follows, or nobody will send again, it must not have.
		m.deliver()
		m.pass(e.kind, []item{{entry: e}}, nil, nil)
	}
	e.kind.settle(e)
}

// move has the control plane's side look at a name again.
func (m *machine) move(e *entry) {
	e.kind.moved[e.name] = true
	m.wakePlane()
}

func (m *machine) wakePlane() {
	if m.plane != nil {
		m.plane.wake()
	}
}
