package webhook

import (
	"fmt"
	"net/http"
	"net/netip"
	"sync"
)

// Anybody who reaches the port may post: API servers show no certificate unless they are told to. What a request can cost is bounded by what
// it holds, and what all of them cost together by a budget, of which one address has a part only.
const (
	maxMemory       = 256 << 20 // of all requests that are under way; the control plane's limit is 1 GiB by default
	maxSourceMemory = 96 << 20  // of those from one address
	byteMemory      = 3         // a byte is read, copied as the object, and copied into it
)

// load bounds requests of one kind by their JSON values: "{}" is 2 bytes, and a container of some hundred in memory.
type load struct {
	values int // at most
	each   int // bytes of memory that one may take, garbage included (TestBounded)
}

var (
	podLoad    = load{values: 20_000, each: 4 << 10}
	policyLoad = load{values: 100_000, each: 512}
)

// budget is what requests under way take.
type budget struct {
	mu      sync.Mutex
	total   int
	sources map[netip.Addr]int
}

// take sets memory aside for a source until it is given back, and reports whether there is enough.
func (b *budget) take(source netip.Addr, bytes int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.total+bytes > maxMemory || b.sources[source]+bytes > maxSourceMemory {
		return false
	}
	b.total += bytes
	if b.sources == nil {
		b.sources = map[netip.Addr]int{}
	}
	b.sources[source] += bytes
	return true
}

func (b *budget) giveBack(source netip.Addr, bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total -= bytes
	if b.sources[source] -= bytes; b.sources[source] == 0 {
		delete(b.sources, source)
	}
}

// share is one request's part of a budget.
type share struct {
	of     *budget
	source netip.Addr
	bytes  int
}

// grow takes more; an error is for whoever asks.
func (s *share) grow(bytes int) error {
	if !s.of.take(s.source, bytes) {
		return refused{http.StatusServiceUnavailable, fmt.Errorf("too much is asked at once, by %s or by all: try again", s.source)}
	}
	s.bytes += bytes
	return nil
}

func (s *share) end() { s.of.giveBack(s.source, s.bytes) }

// source is where a request comes from.
func source(r *http.Request) netip.Addr {
	a, _ := netip.ParseAddrPort(r.RemoteAddr) // net/http writes it
	return a.Addr().Unmap()
}

// values counts what a JSON text has at least as many of as values: commas and opening brackets outside of strings.
func values(text []byte) (n int) {
	quoted := false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && (c == ',' || c == '{' || c == '['):
			n++
		}
	}
	return n
}

// refused is an error with the status that whoever asks is to have.
type refused struct {
	code int
	error
}
