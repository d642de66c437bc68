package replica

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcstatus "google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/svid"
	"github.com/mantlet/mantlet/install"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	xdsnames "github.com/mantlet/mantlet/xds/names"
)

var td = spiffeid.RequireTrustDomainFromString("td.example")

// world is a real API server with pods, of which it hears from the test, and replicas in this process.
type world struct {
	t      *testing.T
	config string // kubeconfig of an administrator
	api    *rest.Config
	client kubernetes.Interface
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s := apitest.Start(t, cluster.APIServerOptions{})
	w := &world{t: t, config: s.Kubeconfig(), api: apitest.Config(t, s), client: apitest.Client(t, s)}
	for _, name := range []string{"shop", names.SystemNamespace} {
		_, err := w.client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		w.must(err)
	}
	w.grant()
	_, err := w.client.CoreV1().ServiceAccounts("shop").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	w.must(err)
	_, err = w.client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.64.0.0/24"}}}, metav1.CreateOptions{})
	w.must(err)
	return w
}

// grant has replicas be who the chart says, with the rights that it gives them.
func (w *world) grant() {
	w.t.Helper()
	list, err := install.Render(install.Options{Set: []string{"image=registry.example/mantlet@sha256:01"}})
	w.must(err)
	rbac := w.client.RbacV1()
	for _, m := range list {
		if m.Name != names.Service {
			continue
		}
		var err error
		switch m.Kind {
		case "ClusterRole":
			_, err = rbac.ClusterRoles().Create(w.t.Context(), read[rbacv1.ClusterRole](w.t, m), metav1.CreateOptions{})
		case "ClusterRoleBinding":
			_, err = rbac.ClusterRoleBindings().Create(w.t.Context(), read[rbacv1.ClusterRoleBinding](w.t, m), metav1.CreateOptions{})
		case "Role":
			_, err = rbac.Roles(m.Namespace).Create(w.t.Context(), read[rbacv1.Role](w.t, m), metav1.CreateOptions{})
		case "RoleBinding":
			_, err = rbac.RoleBindings(m.Namespace).Create(w.t.Context(), read[rbacv1.RoleBinding](w.t, m), metav1.CreateOptions{})
		}
		w.must(err)
	}
	w.api.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + names.SystemNamespace + ":mantlet"}
}

func read[T any](t *testing.T, m install.Manifest) *T {
	t.Helper()
	out := new(T)
	if err := yaml.UnmarshalStrict(m.Text, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// until waits until something holds that has no event here.
func (w *world) until(what string, holds func() bool) {
	w.t.Helper()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for end := time.Now().Add(time.Minute); !holds(); <-look.C {
		if time.Now().After(end) {
			w.t.Fatalf("after a minute not yet: %s", what)
		}
	}
}

// text is a log that several goroutines write.
type text struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *text) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *text) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// running is a replica.
type running struct {
	agents string // address
	health string // address
	status string // URL
	log    *text
	ask    func()          // asks it to end
	ended  <-chan struct{} // closed when it has
	stop   func()          // ends it
}

// port is one that is free.
func (w *world) port() (address string) {
	w.t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	w.must(free.Close())
	return free.Addr().String()
}

// start runs a replica until it is stopped, and returns when it serves.
func (w *world) start() *running {
	w.t.Helper()
	return w.startWith(Config{})
}

// startWith does so with more configuration.
func (w *world) startWith(c Config) *running {
	w.t.Helper()
	at, ended := w.port(), make(chan struct{})
	r := &running{health: w.port(), status: "http://" + at, log: &text{}, ended: ended}
	ctx, cancel := context.WithCancel(context.Background())
	serves := make(chan string, 1)
	c.API, c.TrustDomain, c.Listen, c.Health, c.Status, c.Name = w.api, td, "127.0.0.1:0", r.health, at, at
	c.Secret = types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret}
	c.Log, c.Listening = slog.New(slog.NewTextHandler(r.log, nil)), func(agents, _ net.Addr) { serves <- agents.String() }
	var err error
	go func() {
		err = Run(ctx, c)
		close(ended)
	}()
	r.ask = cancel
	r.stop = sync.OnceFunc(func() {
		cancel()
		if <-ended; err != nil {
			w.t.Errorf("a replica ended with %v", err)
		}
	})
	w.t.Cleanup(func() {
		r.stop()
		if w.t.Failed() {
			w.t.Logf("replica:\n%s", r.log)
		}
	})
	select {
	case r.agents = <-serves:
	case <-time.After(time.Minute):
		w.t.Fatalf("the replica does not serve:\n%s", r.log)
	}
	return r
}

// report is what the replica reports.
func (w *world) report(r *running) (out status.Report) {
	w.t.Helper()
	resp, err := http.Get(r.status + status.Path)
	w.must(err)
	defer resp.Body.Close()
	w.must(json.NewDecoder(resp.Body).Decode(&out))
	return out
}

// pod makes a pod that has a sidecar.
func (w *world) pod(name, app, ip string) *corev1.Pod {
	w.t.Helper()
	always := corev1.ContainerRestartPolicyAlways
	api := w.client.CoreV1().Pods("shop")
	p, err := api.Create(w.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": app}},
		Spec: corev1.PodSpec{NodeName: "node", ServiceAccountName: "default",
			InitContainers: []corev1.Container{{Name: names.Container, Image: "localhost/mantlet:1", RestartPolicy: &always}},
			Containers:     []corev1.Container{{Name: "app", Image: "localhost/app:1"}}},
	}, metav1.CreateOptions{})
	w.must(err)
	p.Status.Phase, p.Status.PodIP, p.Status.PodIPs = corev1.PodRunning, ip, []corev1.PodIP{{IP: ip}}
	p, err = api.UpdateStatus(w.t.Context(), p, metav1.UpdateOptions{})
	w.must(err)
	return p
}

func (w *world) relabel(name, app string) {
	w.t.Helper()
	api := w.client.CoreV1().Pods("shop")
	p, err := api.Get(w.t.Context(), name, metav1.GetOptions{})
	w.must(err)
	p.Labels["app"] = app
	_, err = api.Update(w.t.Context(), p, metav1.UpdateOptions{})
	w.must(err)
}

// admit is a policy that has one app hear another only.
func (w *world) admit(to, from string) {
	w.t.Helper()
	_, err := w.client.NetworkingV1().NetworkPolicies("shop").Create(w.t.Context(), &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: to},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": to}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": from}}}}}},
		},
	}, metav1.CreateOptions{})
	w.must(err)
}

// sidecar is a pod's agent as far as a control plane sees it: it has an identity, and holds the verdicts that it is sent.
type sidecar struct {
	w      *world
	pod    *corev1.Pod
	addr   netip.Addr
	source *svid.Builtin
	stop   func()

	mu       sync.Mutex
	at       string // where it goes next
	verdicts *verdict.Verdicts
	from     string // who sent them
	lost     context.CancelFunc
}

// run has a pod's sidecar go to a replica. It renews its certificate after maxAge; zero: at half of its validity.
func (w *world) run(pod *corev1.Pod, to *running, maxAge time.Duration) *sidecar {
	w.t.Helper()
	var bundle *x509bundle.Bundle
	w.until("the namespace has a trust bundle", func() bool {
		m, err := w.client.CoreV1().ConfigMaps("shop").Get(w.t.Context(), names.RootConfigMap, metav1.GetOptions{})
		if err != nil {
			return false
		}
		bundle, err = x509bundle.Parse(td, []byte(m.Data[names.RootKey]))
		return err == nil
	})
	granted, err := w.client.CoreV1().ServiceAccounts("shop").CreateToken(w.t.Context(), "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:      []string{names.TokenAudience},
		BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}, metav1.CreateOptions{})
	w.must(err)
	token := func() (string, error) { return granted.Status.Token, nil }
	s := &sidecar{w: w, pod: pod, addr: netip.MustParseAddr(pod.Status.PodIP), at: to.agents}
	log := &text{}
	s.source, err = svid.NewBuiltin(svid.BuiltinConfig{
		Address: "control plane", TrustDomain: td, Bundle: bundle, Token: token, Log: slog.New(slog.NewTextHandler(log, nil)), MaxAge: maxAge,
		DialContext: func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", s.address())
		},
	})
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	parts.Go(func() { _ = s.source.Run(ctx) })
	parts.Go(func() {
		select {
		case <-s.source.Ready():
		case <-ctx.Done():
		}
		for ctx.Err() == nil {
			if err := s.stream(ctx, token); grpcstatus.Code(err) == codes.Unauthenticated {
				s.source.Renew() // as agent does
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond): // as agent/relay does
			}
		}
	})
	s.stop = sync.OnceFunc(func() {
		cancel()
		parts.Wait()
	})
	w.t.Cleanup(func() {
		s.stop()
		if w.t.Failed() {
			w.t.Logf("sidecar of %s:\n%s", pod.Name, log)
		}
	})
	select {
	case <-s.source.Ready():
	case <-time.After(time.Minute):
		w.t.Fatalf("%s has no certificate:\n%s", pod.Name, log)
	}
	return s
}

func (s *sidecar) address() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at
}

// move has the sidecar go to another replica.
func (s *sidecar) move(to *running) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = to.agents
	if s.lost != nil {
		s.lost()
	}
}

// stream is one stream, as agent/relay has it.
func (s *sidecar) stream(ctx context.Context, token func() (string, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.mu.Lock()
	at := s.at
	s.lost = cancel
	s.mu.Unlock()
	config := tlsconfig.MTLSClientConfig(s.source, s.source, tlsconfig.AuthorizeID(identity.ControlPlane(td)))
	config.MinVersion = tls.VersionTLS13
	conn, err := grpc.NewClient("passthrough:///"+at, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithPerRPCCredentials(attest.Bearer(token)))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // nothing is lost with it
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsnames.TypeVerdicts, ResourceNamesSubscribe: []string{xdsnames.Verdicts}}); err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, r := range resp.Resources {
			v, err := wire.Unmarshal(r.Resource.Value)
			if err != nil {
				return err
			}
			s.mu.Lock()
			s.verdicts, s.from = v, at
			s.mu.Unlock()
		}
		if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce}); err != nil {
			return err
		}
	}
}

// svid is the certificate that the sidecar has now.
func (s *sidecar) svid() *x509svid.SVID {
	s.w.t.Helper()
	is, err := s.source.GetX509SVID()
	s.w.must(err)
	return is
}

// admits reports whether the sidecar, as a replica has told it, lets in who shows an identity from the address of a pod. It waits until the replica
// has told it anything.
func (s *sidecar) admits(by *running, id spiffeid.ID, from netip.Addr) bool {
	s.w.t.Helper()
	var v *verdict.Verdicts
	s.w.until(s.pod.Name+" has verdicts of the replica", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		v = s.verdicts
		return v != nil && s.from == by.agents
	})
	return verdict.NewIngress(v).Admits(verdict.TCP, 80, verdict.Peer{ID: id, Addr: from})
}
