package incluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// tcpOnly keeps pods from Services over UDP. Else they are all told of DNS's endpoints, which come and go with its readiness on a busy machine.
const tcpOnly = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: tcp-only}
spec: {podSelector: {}, policyTypes: [Egress], egress: [{ports: [{protocol: TCP}]}]}
`

// One replica becomes twenty: those that use its Service are told of the new endpoints, and nobody else is told anything. The new pods are admitted
// where the first one was.
func TestScale(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "scale")
	p.apply(tcpOnly, server("web", 1), server("other", 1), server("db", 1), admit("web", "user"), admit("other", "bystander"), admit("db", "web"),
		client("user", ""), client("bystander", ""), client("idle", ""))
	p.ready("deployment/web", "deployment/other", "deployment/db", "pod/user", "pod/bystander", "pod/idle")
	p.eventually("admitted", "user", traffic.Reached, p.service("web"))
	p.eventually("admitted", "bystander", traffic.Reached, p.service("other"))
	before, sentBefore := p.quiet()
	p.kubectl("scale", "deployment/web", "--replicas=20")
	p.ready("deployment/web")
	// All are in the Service when the user's sidecar was told so.
	err := Await(t.Context(), patience, func(ctx context.Context) error {
		all, err := p.Try(ctx, "scale/user", slices.Repeat([]string{p.service("web")}, 200)...)
		hosts := map[string]bool{}
		for _, a := range all {
			if a.Outcome != traffic.Reached {
				return fmt.Errorf("%+v", a)
			}
			hosts[a.Host] = true
		}
		if len(hosts) < 20 {
			return fmt.Errorf("200 attempts reached %d pods of 20", len(hosts))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	after, sentAfter := p.quiet()
	told := map[string]bool{}
	for name, was := range before {
		if is, ok := after[name]; ok && is.After(was) {
			told[name] = true
		}
	}
	for name := range told { // the first replica is no user of its own Service, and is told nothing either
		if name != "scale/user" {
			t.Errorf("the sidecar of %s was sent something, and has nothing to do with the Service", name)
		}
	}
	if !told["scale/user"] {
		t.Error("the sidecar of the Service's user was sent nothing")
	}
	t.Logf("sidecars before: %d, after: %d, of the former were told something: %v", len(before), len(after), slices.Sorted(maps.Keys(told)))
	for _, kind := range slices.Sorted(maps.Keys(sentAfter)) {
		t.Logf("responses of %s: %d, those to the new pods among them", kind, sentAfter[kind]-sentBefore[kind])
	}
	p.want("not admitted", "bystander", traffic.Refused, p.service("web"))
	for _, pod := range p.pods("web") {
		if len(pod.Spec.InitContainers) != 1 {
			t.Errorf("pod %s has no sidecar", pod.Name)
		}
	}
}

// quiet waits until every sidecar of the namespace has confirmed everything and nothing is sent any more; it returns when each has confirmed
// last, and how many responses all replicas have sent, by type.
func (p place) quiet() (acks map[string]time.Time, sent map[string]int) {
	p.Helper()
	var last map[string]int
	err := Await(p.Context(), patience, func(ctx context.Context) error {
		s, err := p.Status(ctx)
		if len(s.Sidecars) == 0 {
			return fmt.Errorf("no sidecar is known: %w", err)
		}
		acks = map[string]time.Time{}
		for _, c := range s.In(p.name).Sidecars {
			if c.State != status.InForce {
				return fmt.Errorf("the sidecar of %s: %s", c.Pod, c.State)
			}
			acks[c.Pod] = c.LastAck
		}
		if sent, err = p.responses(ctx); err != nil {
			return err
		}
		if !maps.Equal(sent, last) { // since the last look, some hundred milliseconds ago
			last = sent
			return errors.New("responses are still being sent")
		}
		return nil
	})
	if err != nil {
		p.Fatal(err)
	}
	return acks, sent
}

// responses adds up mantlet_xds_responses_total of all replicas, by type.
func (p place) responses(ctx context.Context) (map[string]int, error) {
	pods, err := p.Client.CoreV1().Pods("mantlet-system").List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=control-plane"})
	if err != nil {
		return nil, err
	}
	sum := map[string]int{}
	for _, pod := range pods.Items {
		text, err := get(ctx, "http://"+pod.Status.PodIP+":15014/metrics")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(text) {
			line, ok := strings.CutPrefix(line, `mantlet_xds_responses_total{type="`)
			if !ok {
				continue
			}
			kind, count, _ := strings.Cut(line, `"} `)
			n, err := strconv.ParseFloat(strings.TrimSpace(count), 64)
			if err != nil {
				return nil, fmt.Errorf("metrics of %s: %q: %w", pod.Name, line, err)
			}
			sum[kind] += int(n)
		}
	}
	if len(sum) == 0 {
		return nil, errors.New("no replica counts responses")
	}
	return sum, nil
}

func get(ctx context.Context, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", url, response.Status)
	}
	return string(text), err
}
