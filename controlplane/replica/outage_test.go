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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source/kube"
)

// fakeCluster is an API server that answers lists with what it is told of, and watches with no more than a bookmark.
type fakeCluster struct {
	version string              // resourceVersion of all that it lists, and the only one that it can be watched from
	objects map[string][]string // names, by resource
	over    chan struct{}       // closed: what is watched has become too old, and watches end
	last    string              // what is sent in a watch before it ends so
}

// singular are the kinds by resource.
var singular = map[string]string{"pods": "Pod", "namespaces": "Namespace", "nodes": "Node", "services": "Service", "endpointslices": "EndpointSlice",
	"networkpolicies": "NetworkPolicy", "servicecidrs": "ServiceCIDR"}

func (c *fakeCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	resource, version := path.Base(r.URL.Path), "v1"
	if group, ok := strings.CutPrefix(r.URL.Path, "/apis/"); ok {
		version = path.Dir(group)
	}
	q := r.URL.Query()
	switch {
	case q.Get("sendInitialEvents") != "": // no streaming lists: it is asked for a list then
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422}`)
	case q.Get("watch") != "" && q.Get("resourceVersion") != c.version:
		w.WriteHeader(http.StatusGone)
		fmt.Fprint(w, tooOld)
	case q.Get("watch") != "":
		// client-go lists anew by itself where a watch ends within a second with nothing in it; not after this.
		fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":%q}}}`+"\n", singular[resource], version, c.version)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-r.Context().Done():
		case <-c.over:
			fmt.Fprint(w, c.last)
		}
	default:
		var items []string
		for _, name := range c.objects[resource] {
			items = append(items, fmt.Sprintf(`{"metadata":{"name":%q,"namespace":"shop","resourceVersion":%q}}`, name, c.version))
		}
		fmt.Fprintf(w, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":%q},"items":[%s]}`, singular[resource]+"List", version, c.version, strings.Join(items, ","))
	}
}

// serve is an API server at an address until the function that it returns is called.
func serve(t *testing.T, c http.Handler, at string) (address string, gone func()) {
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

// told writes down what a source tells of: "pod a", or "-pod a" for one that is gone.
type told chan string

func (n told) Update(applied, deleted []metav1.Object) error {
	for _, o := range applied {
		n <- called(o)
	}
	for _, o := range deleted {
		n <- "-" + called(o)
	}
	return nil
}

func called(o metav1.Object) string {
	_, kind, _ := strings.Cut(fmt.Sprintf("%T", o), ".")
	return strings.ToLower(kind) + " " + o.GetName()
}

func (told) Renumber(_, _ []netip.Prefix, _ *policy.Objects) error { return nil }

// lines is a log of which each line can be waited for.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}

// follower watches a cluster as a replica does.
type follower struct {
	t      *testing.T
	log    lines
	news   told
	ended  chan error
	cancel context.CancelFunc
}

const patience = 30 * time.Second

// follow returns when the cluster is known.
func follow(t *testing.T, address string) *follower {
	t.Helper()
	f := &follower{t: t, log: make(lines, 1000), news: make(told, 100), ended: make(chan error, 1)}
	logger := slog.New(slog.NewTextHandler(f.log, nil))
	config := &rest.Config{Host: "http://" + address}
	config.Wrap(persist(logger))
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, f.cancel = context.WithCancel(t.Context())
	t.Cleanup(f.cancel)
	started := make(chan struct{})
	go func() {
		f.ended <- kube.New(kube.Config{Client: client, Log: logger}).Run(ctx, func(kube.Networks, *policy.Objects) (kube.Target, error) {
			close(started)
			return f.news, nil
		})
	}()
	select {
	case <-started:
	case <-time.After(patience):
		t.Fatal("the cluster is never known")
	}
	return f
}

// logs waits until something is logged.
func (f *follower) logs(what string) {
	f.t.Helper()
	end := time.After(patience)
	for {
		select {
		case line := <-f.log:
			if strings.Contains(line, what) {
				return
			}
		case <-end:
			f.t.Fatalf("it is not logged that %q", what)
		}
	}
}

// hears waits until it has been told of all that is wanted, and says what it was told beside that.
func (f *follower) hears(wanted ...string) (more []string) {
	f.t.Helper()
	missing := slices.Clone(wanted)
	for end := time.After(patience); len(missing) > 0; {
		select {
		case name := <-f.news:
			if i := slices.Index(missing, name); i >= 0 {
				missing = slices.Delete(missing, i, i+1)
			} else {
				more = append(more, name)
			}
		case <-end:
			f.t.Fatalf("not told of %q, only of %q", missing, more)
		}
	}
	return more
}

// tooOld is how API servers say that they have forgotten what was since (Kubernetes API concepts, "Efficient detection of changes").
const tooOld = `{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version: 1 (2)","reason":"Expired","code":410}`

var (
	before = map[string][]string{"namespaces": {"old", "kept"}, "pods": {"old", "kept"}, "networkpolicies": {"old", "kept"}}
	after  = map[string][]string{"namespaces": {"kept", "new"}, "pods": {"kept", "new"}, "networkpolicies": {"kept", "new"}}
	// difference is what who knew before has to be told after; all that was kept has been written since.
	difference = []string{"-namespace old", "-pod old", "-networkpolicy old", "namespace new", "pod new", "networkpolicy new", "namespace kept", "pod kept", "networkpolicy kept"}
)

// TestOutage: who watches a cluster hears of what has changed soon after an API server that was away; what was deleted meanwhile is deleted here too, though
// nobody says so, but that it is in no list. It ends at once when asked to while no API server is there.
func TestOutage(t *testing.T) {
	address, gone := serve(t, &fakeCluster{version: "1", objects: before}, "127.0.0.1:0")
	f := follow(t, address)
	gone()
	f.logs("does not answer")
	_, gone = serve(t, &fakeCluster{version: "2", objects: after}, address)
	f.logs("answers again")
	if more := f.hears(difference...); len(more) > 0 {
		t.Errorf("told of %q too", more)
	}
	gone()
	f.logs("does not answer")
	f.cancel()
	select {
	case err := <-f.ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it does not end while there is no API server")
	}
}

// TestTooOld: where a watch cannot go on all is listed anew, and nothing of what happened meanwhile is lost.
func TestTooOld(t *testing.T) {
	for name, c := range map[string]struct{ last, logged string }{
		"the watch ends, and the next request is answered with 410": {"", "all is listed anew"},
		"an event in the watch says 410":                            {`{"type":"ERROR","object":` + tooOld + "}\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var now atomic.Pointer[fakeCluster]
			first := &fakeCluster{version: "1", objects: before, over: make(chan struct{}), last: c.last}
			now.Store(first)
			address, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { now.Load().ServeHTTP(w, r) }), "127.0.0.1:0")
			f := follow(t, address)
			now.Store(&fakeCluster{version: "2", objects: after})
			close(first.over)
			if c.logged != "" {
				f.logs(c.logged)
			}
			if more := f.hears(difference...); len(more) > 0 {
				t.Errorf("told of %q too", more)
			}
		})
	}
}
