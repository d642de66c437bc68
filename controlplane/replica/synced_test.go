package replica

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// heldBack is an API server that has not answered yet what is asked about one kind in the whole cluster.
type heldBack struct {
	resource string
	released chan struct{}

	mu       sync.Mutex
	asked    bool
	answered map[string]bool // other kinds
}

// transport is http.RoundTripper's one method.
type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// wrap is a rest.Config's wrapper of transports.
func (h *heldBack) wrap(next http.RoundTripper) http.RoundTripper {
	return transport(func(r *http.Request) (*http.Response, error) { return h.pass(r, next) })
}

func (h *heldBack) pass(r *http.Request, next http.RoundTripper) (*http.Response, error) {
	resource := path.Base(r.URL.Path)
	if _, watched := singular[resource]; !watched || strings.Contains(r.URL.Path, "/namespaces/") {
		return next.RoundTrip(r)
	}
	if resource == h.resource {
		h.mu.Lock()
		h.asked = true
		h.mu.Unlock()
		select {
		case <-h.released:
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
		return next.RoundTrip(r)
	}
	answer, err := next.RoundTrip(r)
	if err == nil {
		h.mu.Lock()
		h.answered[resource] = true
		h.mu.Unlock()
	}
	return answer, err
}

// allElse reports whether the one kind is all that is missing.
func (h *heldBack) allElse() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.asked && len(h.answered) == len(singular)-1
}

// TestAllSynced: while the list of any one kind is missing a replica is not ready, and its agents' port is closed: what is not known of pods, policies or
// namespaces must not be taken for what is not there.
func TestAllSynced(t *testing.T) {
	w := newWorld(t)
	type waiting struct {
		*heldBack
		ready  func() (int, error)
		serves chan struct{}
	}
	replicas := map[string]*waiting{}
	for resource := range singular {
		free, err := net.Listen("tcp", "127.0.0.1:0")
		w.must(err)
		health := free.Addr().String()
		w.must(free.Close())
		p := &waiting{serves: make(chan struct{}), ready: func() (int, error) {
			r, err := http.Get("http://" + health + "/readyz")
			if err != nil {
				return 0, err
			}
			return r.StatusCode, r.Body.Close()
		}}
		p.heldBack = &heldBack{resource: resource, released: make(chan struct{}), answered: map[string]bool{}}
		api := rest.CopyConfig(w.api)
		api.Wrap(p.wrap)
		ctx, cancel := context.WithCancel(context.Background())
		log, ended := &text{}, make(chan error, 1)
		go func() {
			ended <- Run(ctx, Config{
				API: api, TrustDomain: td, Listen: "127.0.0.1:0", Health: health, Name: resource, Log: slog.New(slog.NewTextHandler(log, nil)),
				Secret:    types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret},
				Listening: func(net.Addr, net.Addr) { close(p.serves) },
			})
		}()
		t.Cleanup(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("%s: %v", resource, err)
			}
			if t.Failed() {
				t.Logf("replica without %s:\n%s", resource, log)
			}
		})
		replicas[resource] = p
	}
	for resource, p := range replicas {
		w.until("all but "+resource+" is answered", p.allElse)
	}
	w.start() // who misses nothing serves by now: so would they who began before
	for _, resource := range slices.Sorted(maps.Keys(replicas)) {
		p := replicas[resource]
		if code, err := p.ready(); err != nil || code != http.StatusServiceUnavailable {
			t.Errorf("without %s: ready is answered with %d, %v", resource, code, err)
		}
		select {
		case <-p.serves:
			t.Errorf("without %s agents are served", resource)
		default:
		}
		close(p.released)
		w.until("it serves with "+resource, func() bool {
			code, err := p.ready()
			return err == nil && code == http.StatusOK
		})
		<-p.serves
	}
}
