package replica

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source/kube"
)

// emptyCluster answers lists with nothing, but for the namespaces that it is told of, and watches never.
type emptyCluster struct{ namespaces []string }

func (c emptyCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	q := r.URL.Query()
	switch {
	case q.Get("sendInitialEvents") != "": // no streaming lists: it is asked for a list then
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
	case q.Get("watch") != "":
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	default:
		kind, version := path.Base(r.URL.Path), "v1"
		if group, ok := strings.CutPrefix(r.URL.Path, "/apis/"); ok {
			version = path.Dir(group)
		}
		var items []string
		if kind == "namespaces" {
			for _, name := range c.namespaces {
				items = append(items, fmt.Sprintf(`{"metadata":{"name":%q,"resourceVersion":"1"}}`, name))
			}
		}
		names := map[string]string{"pods": "Pod", "namespaces": "Namespace", "nodes": "Node", "services": "Service", "endpointslices": "EndpointSlice",
			"networkpolicies": "NetworkPolicy", "servicecidrs": "ServiceCIDR"}
		fmt.Fprintf(w, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"1"},"items":[%s]}`, names[kind]+"List", version, strings.Join(items, ","))
	}
}

// serve is an API server at an address until the function that it returns is called.
func (c emptyCluster) serve(t *testing.T, at string) (address string, gone func()) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(c)
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	gone = sync.OnceFunc(func() {
		_ = l.Close()
		s.CloseClientConnections()
		s.Close()
	})
	t.Cleanup(gone)
	return l.Addr().String(), gone
}

// told writes down which namespaces a source tells of.
type told chan string

func (n told) Update(applied, _ []metav1.Object) error {
	for _, o := range applied {
		n <- o.GetName()
	}
	return nil
}

func (told) Renumber(_, _ []netip.Prefix, _ *policy.Objects) error { return nil }

// lines is a log of which each line can be waited for.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}

// TestOutage: who watches a cluster hears of what has changed soon after an API server that was away, and ends at once when asked to while none is there.
func TestOutage(t *testing.T) {
	log := make(lines, 1000)
	address, gone := emptyCluster{}.serve(t, "127.0.0.1:0")
	logger := slog.New(slog.NewTextHandler(log, nil))
	config := &rest.Config{Host: "http://" + address}
	config.Wrap(persist(logger))
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started, news, ended := make(chan struct{}), make(told, 10), make(chan error, 1)
	go func() {
		ended <- kube.New(kube.Config{Client: client, Log: logger}).Run(ctx, func(kube.Networks, *policy.Objects) (kube.Target, error) {
			close(started)
			return news, nil
		})
	}()
	const patience = 30 * time.Second
	await := func(what string) {
		t.Helper()
		end := time.After(patience)
		for {
			select {
			case line := <-log:
				if strings.Contains(line, what) {
					return
				}
			case <-end:
				t.Fatalf("it is not logged that %q", what)
			}
		}
	}
	select {
	case <-started:
	case <-time.After(patience):
		t.Fatal("the cluster is never known")
	}
	gone()
	await("does not answer")
	_, gone = emptyCluster{[]string{"new"}}.serve(t, address)
	await("answers again")
	select {
	case name := <-news:
		if name != "new" {
			t.Errorf("told of %s", name)
		}
	case <-time.After(patience):
		t.Error("nobody tells of what came to be during the outage")
	}
	gone()
	await("does not answer")
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end while there is no API server")
	}
}
