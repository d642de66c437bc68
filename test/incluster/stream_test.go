package incluster

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// streams is a pod that keeps one connection to each address for as long as it lasts.
type streams struct {
	place
	log       string
	addresses []string
}

// streams starts one as a friend, with echo servers that admit friends only: to each of these, and to their Service. mark is what the streams
// had when all of them stood.
func (p place) streams() (s *streams, mark map[string]traffic.Course) {
	p.Helper()
	p.apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: echo}
spec:
  replicas: %d
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec: {terminationGracePeriodSeconds: 1, containers: [{name: app, image: "CLIENT", args: [echo, ":8080"], readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {selector: {app: echo}, ports: [{port: 80, targetPort: 8080}]}
`, nodes), admit("echo", "friend"))
	p.ready("deployment/echo")
	s = &streams{place: p, addresses: []string{p.service("echo")}}
	for _, pod := range p.pods("echo") {
		s.addresses = append(s.addresses, pod.Status.PodIP+":8080")
	}
	const name = "streams"
	p.apply(strings.Replace(labelled(name, "friend", ""), "args: [pause]", `args: [stream, "`+strings.Join(s.addresses, `", "`)+`"]`, 1))
	p.ready("pod/" + name)
	s.log = p.logOf(name)
	return s, s.more(10)
}

// more waits until every connection had n lines more.
func (s *streams) more(n int) (now map[string]traffic.Course) {
	s.Helper()
	courses := func() (map[string]traffic.Course, error) {
		return lastLines(s.log, func(c traffic.Course) string { return c.To })
	}
	before, err := courses()
	if err != nil {
		s.Fatal(err)
	}
	err = Await(s.Context(), patience, func(context.Context) (err error) {
		if now, err = courses(); err != nil {
			return err
		}
		for _, to := range s.addresses {
			if now[to].Lines < before[to].Lines+n {
				return fmt.Errorf("stream to %s: %d lines, and %d before: %+v", to, now[to].Lines, before[to].Lines, now[to].Lately)
			}
		}
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
	return now
}

// unbroken wants each connection to be the one that it was at mark, and n lines more to pass.
func (s *streams) unbroken(why string, mark map[string]traffic.Course, n int) {
	s.Helper()
	now := s.more(n)
	for _, to := range s.addresses {
		if c := now[to]; c.Breaks != mark[to].Breaks {
			s.Errorf("%s: stream to %s: %d breaks, %d before: %+v", why, to, c.Breaks, mark[to].Breaks, c.Lately)
		} else {
			s.Logf("%s: stream to %s: %d lines on one connection, the slowest after %s", why, to, c.Lines-mark[to].Lines, c.Slowest)
		}
	}
}

// slow is an admission that is told of.
const slow = 2 * time.Second

// creating has the API server admit pods without pause, and not make them, until the function is called, which wants none to have been refused.
func (p place) creating() (stop func()) {
	ctx, cancel := context.WithCancel(p.Context())
	var loop sync.WaitGroup
	var admitted atomic.Int32
	loop.Go(func() {
		for refused := 0; ctx.Err() == nil && refused < 10; {
			began := time.Now()
			pod, err := p.Client.CoreV1().Pods(p.name).Create(ctx, &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{GenerateName: "new-", Labels: map[string]string{"app": "new"}},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: Client, Args: []string{"pause"}}}},
			}, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			switch {
			case ctx.Err() != nil:
			case err != nil:
				refused++
				p.Errorf("a pod is refused after %d were admitted: %v", admitted.Load(), err)
			case len(pod.Spec.InitContainers) == 0:
				p.Errorf("a pod is admitted without a sidecar after %d others", admitted.Load())
			default:
				admitted.Add(1)
				if took := time.Since(began); took > slow {
					p.Logf("pod %d was admitted after %s, at %s", admitted.Load(), took.Round(time.Millisecond), time.Now().Format(time.TimeOnly))
				}
			}
		}
	})
	return func() {
		p.Helper()
		cancel()
		loop.Wait()
		if n := admitted.Load(); n < 50 {
			p.Errorf("%d pods were admitted: too few to show anything", n)
		} else {
			p.Logf("%d pods were admitted", n)
		}
	}
}
