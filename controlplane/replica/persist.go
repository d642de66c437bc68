package replica

import (
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"
)

// persistent asks the API server again, for as long as the request's context lasts, where nobody answers at all: a reflector that saw the error would
// wait by client-go's backoff, which informers cannot set, and which after an outage of 30 s is up to a minute (tools/cache, reflector.go). Only
// GET is asked again, which lists and watches; what the API server answers, errors too, is the reflector's to judge.
type persistent struct {
	next http.RoundTripper
	log  *slog.Logger

	mu   sync.Mutex
	said time.Time // when it was last written that nobody answers; zero: somebody does
}

const (
	askAgain = time.Second // up to twice that, so that replicas and kinds do not come all at once
	sayAgain = time.Minute
)

// persist is a rest.Config's wrapper of transports.
func persist(log *slog.Logger) func(http.RoundTripper) http.RoundTripper {
	return func(next http.RoundTripper) http.RoundTripper { return &persistent{next: next, log: log} }
}

func (p *persistent) RoundTrip(r *http.Request) (*http.Response, error) {
	for {
		answer, err := p.next.RoundTrip(r)
		if err == nil {
			p.answered()
			return answer, nil
		}
		if r.Method != http.MethodGet || r.Context().Err() != nil {
			return nil, err
		}
		p.unanswered(r, err)
		select {
		case <-time.After(askAgain + rand.N(askAgain)):
		case <-r.Context().Done():
			return nil, err
		}
	}
}

func (p *persistent) unanswered(r *http.Request, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.said) > sayAgain {
		p.said = time.Now()
		p.log.Warn("the API server does not answer; what is known stays, and it is asked again every second or two", "server", r.URL.Host, "path", r.URL.Path, "error", err)
	}
}

func (p *persistent) answered() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.said.IsZero() {
		p.said = time.Time{}
		p.log.Info("the API server answers again")
	}
}

// WrappedRoundTripper is client-go's way to what is inside (k8s.io/apimachinery/pkg/util/net, RoundTripperWrapper), by which idle connections are closed.
func (p *persistent) WrappedRoundTripper() http.RoundTripper { return p.next }
