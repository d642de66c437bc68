package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/settings"
	"github.com/mantlet/mantlet/install"
)

// front is an address of several replicas, as kube-proxy makes one: a new connection goes where the front leads then, and stays there.
type front struct {
	address string
	to      atomic.Pointer[string]
}

func (w *world) front(to string) *front {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.must(err)
	f := &front{address: l.Addr().String()}
	f.to.Store(&to)
	ctx, end := context.WithCancel(context.Background())
	var open sync.WaitGroup
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() { f.connect(ctx, conn) })
		}
	})
	w.t.Cleanup(func() {
		_ = l.Close()
		end()
		open.Wait()
	})
	return f
}

func (f *front) connect(ctx context.Context, in net.Conn) {
	defer in.Close()
	out, err := new(net.Dialer).DialContext(ctx, "tcp", *f.to.Load())
	if err != nil {
		return
	}
	defer out.Close()
	defer context.AfterFunc(ctx, func() { _, _ = in.Close(), out.Close() })()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(in, out)
		_ = in.(*net.TCPConn).CloseWrite()
	})
	_, _ = io.Copy(out, in)
	_ = out.(*net.TCPConn).CloseWrite()
	back.Wait()
}

// hook has the API server ask at an address about pods, as an installation says, once replicas have told it whom to trust there.
func (w *world) hook(address string) {
	w.t.Helper()
	host, text, err := net.SplitHostPort(address)
	w.must(err)
	number, err := strconv.ParseInt(text, 10, 32)
	w.must(err)
	port := int32(number)
	ctx, api := w.t.Context(), w.client.AdmissionregistrationV1()
	_, err = w.client.CoreV1().Services(names.SystemNamespace).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: names.Service},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: host}}, metav1.CreateOptions{})
	w.must(err)
	list, err := install.Render(install.Options{Set: []string{"image=registry.example/mantlet@sha256:01"}})
	w.must(err)
	for _, m := range list {
		switch m.Kind {
		case "MutatingWebhookConfiguration":
			c := read[admissionregistrationv1.MutatingWebhookConfiguration](w.t, m)
			for i := range c.Webhooks {
				c.Webhooks[i].ClientConfig.Service.Port = &port
			}
			_, err = api.MutatingWebhookConfigurations().Create(ctx, c, metav1.CreateOptions{})
		case "ValidatingWebhookConfiguration":
			c := read[admissionregistrationv1.ValidatingWebhookConfiguration](w.t, m)
			for i := range c.Webhooks {
				c.Webhooks[i].ClientConfig.Service.Port = &port
			}
			_, err = api.ValidatingWebhookConfigurations().Create(ctx, c, metav1.CreateOptions{})
		}
		w.must(err)
	}
}

// create has a pod admitted, and does not make it.
func (w *world) create(ctx context.Context) error {
	p, err := w.client.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "new-"},
		Spec: corev1.PodSpec{ServiceAccountName: "default", SecurityContext: &corev1.PodSecurityContext{RunAsNonRoot: new(true), RunAsUser: new(int64(1))}, Containers: []corev1.Container{{
			Name: "app", Image: "localhost/app:1", SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: new(false)},
		}}}}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	if err == nil && (len(p.Spec.InitContainers) == 0 || p.Spec.InitContainers[0].Name != names.Container) {
		err = fmt.Errorf("a pod without sidecar: %+v", p.Spec.InitContainers)
	}
	return err
}

// get is what a health port answers; 0: nobody does.
func get(health, path string) int {
	answer, err := http.Get("http://" + health + path)
	if err != nil {
		return 0
	}
	_ = answer.Body.Close()
	return answer.StatusCode
}

// TestLeave: a replica that is asked to end is not ready from then on, and answers whoever still comes until the grace is over: no pod is refused, and
// sidecars go one by one.
func TestLeave(t *testing.T) {
	w := newWorld(t)
	const grace = 6 * time.Second
	var pods []*corev1.Pod
	for i := range 6 {
		pods = append(pods, w.pod(fmt.Sprintf("api-%d", i), "api", fmt.Sprintf("10.64.0.%d", 10+i)))
	}
	late := w.pod("late", "api", "10.64.0.30")
	shop, err := w.client.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{})
	w.must(err)
	shop.Labels["mantlet.dev/inject"] = "enabled"
	_, err = w.client.CoreV1().Namespaces().Update(t.Context(), shop, metav1.UpdateOptions{})
	w.must(err)
	first, second := Config{Grace: grace, Webhooks: w.port()}, Config{Webhooks: w.port()}
	webhooks := w.front(first.Webhooks)
	w.hook(webhooks.address)
	for _, c := range []*Config{&first, &second} {
		c.Settings = &settings.Settings{Namespace: names.SystemNamespace, TrustDomain: td.Name(), Image: "registry.example/mantlet@sha256:01"}
	}
	goes, stays := w.startWith(first), w.startWith(second)
	agents := w.front(goes.agents)
	for _, p := range pods {
		w.run(p, &running{agents: agents.address}, 0)
	}
	connected := func(r *running) (n int) {
		for _, p := range w.report(r).Pods {
			if p.Sidecar != nil && p.Sidecar.Connected {
				n++
			}
		}
		return n
	}
	w.until("all sidecars are connected", func() bool { return connected(goes) == len(pods) })
	refused := errors.New("never asked")
	defer func() {
		if refused != nil {
			t.Log(refused)
		}
	}()
	w.until("pods are admitted", func() bool { refused = w.create(t.Context()); return refused == nil })

	ctx, stop := context.WithCancel(t.Context())
	var creating sync.WaitGroup
	var created atomic.Int32
	defer creating.Wait()
	defer stop()
	for range 2 {
		creating.Go(func() {
			for ctx.Err() == nil {
				if err := w.create(ctx); err == nil {
					created.Add(1)
				} else if ctx.Err() == nil {
					t.Errorf("a pod is refused: %v", err)
					return
				}
			}
		})
	}
	began := time.Now()
	goes.ask()
	w.until("it is not ready", func() bool { return get(goes.health, "/readyz") != http.StatusOK })
	noticed := time.Since(began)
	if noticed > grace/6 {
		t.Errorf("it is ready until %s after it was asked to end", noticed)
	}
	moved := time.AfterFunc(grace/10, func() { // by who watches readiness, and takes his time
		webhooks.to.Store(&second.Webhooks)
		agents.to.Store(&stays.agents)
	})
	defer moved.Stop()
	counts, signed := map[int]bool{}, false
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for ; time.Since(began) < grace-time.Second; <-look.C {
		if ready, alive := get(goes.health, "/readyz"), get(goes.health, "/healthz"); ready != http.StatusServiceUnavailable || alive != http.StatusOK {
			t.Fatalf("%s after it was asked to end: ready: %d, alive: %d", time.Since(began), ready, alive)
		}
		before := connected(goes)
		counts[before] = true
		if before == 0 && !signed { // who asks for a certificate is answered to the last
			w.run(late, goes, 0)
			signed = true
		}
	}
	if !counts[len(pods)] || !counts[0] || len(counts) < 4 {
		t.Errorf("how many sidecars it had, while it ended: %v, want them to go one by one", counts)
	}
	<-goes.ended
	if took := time.Since(began); took < grace || took > grace+stopPatience {
		t.Errorf("it ended %s after it was asked to, want %s", took, grace)
	}
	w.until("all sidecars are with the other replica", func() bool { return connected(stays) == len(pods) })
	stop()
	creating.Wait()
	t.Logf("%d pods were admitted meanwhile; the replica had these numbers of sidecars: %v", created.Load(), counts)
	if created.Load() < 20 {
		t.Errorf("%d pods were admitted, too few to show anything", created.Load())
	}
	goes.stop()
}

// TestLeaveUnserved: who has served nobody has nobody to wait for.
func TestLeaveUnserved(t *testing.T) {
	r := &replica{cfg: Config{Grace: time.Hour, Log: slog.New(slog.DiscardHandler)}}
	r.leave(t.Context())
	if !r.leaving.Load() {
		t.Error("it can become ready")
	}
}

// TestGraceOfPods: the chart gives replicas the time that they take.
func TestGraceOfPods(t *testing.T) {
	list, err := install.Render(install.Options{Set: []string{"image=registry.example/mantlet@sha256:01"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range list {
		if m.Kind != "Deployment" {
			continue
		}
		var d struct {
			Spec struct{ Template struct{ Spec corev1.PodSpec } }
		}
		if err := yaml.Unmarshal(m.Text, &d); err != nil {
			t.Fatal(err)
		}
		if s := d.Spec.Template.Spec.TerminationGracePeriodSeconds; s == nil || time.Duration(*s)*time.Second < 2*LongestEnd {
			t.Errorf("%s %s: terminationGracePeriodSeconds %v, want twice %s at least", m.Kind, m.Name, s, LongestEnd)
		}
		return
	}
	t.Error("no Deployment")
}
