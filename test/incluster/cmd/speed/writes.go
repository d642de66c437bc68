package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/controlplane/status/ask"
	"github.com/mantlet/mantlet/test/incluster"
)

// town is the namespace with many pods: apps a0 to a4, each of which hears the next one, and has connected to the one before.
const (
	town = "town"
	apps = 5
)

func app(i int) string { return fmt.Sprintf("a%d", (i+apps)%apps) }

// populate makes them, and has each app use its neighbour, so that its sidecars know that one's endpoints.
func populate(ctx context.Context, w *incluster.World, pods int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {%s: enabled}}\n", town, policy.InjectLabel)
	for i := range apps {
		fmt.Fprintf(&b, `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: %[3]s}
spec:
  replicas: %[4]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: app, image: "%[5]s", args: [pause]}
      - {name: server, image: "%[6]s", args: [netexec, --http-port=8080]}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[3]s}
spec: {selector: {app: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: %[1]s, namespace: %[3]s}
spec: {podSelector: {matchLabels: {app: %[1]s}}, ingress: [{from: [{podSelector: {matchLabels: {app: %[2]s}}}], ports: [{port: 8080}]}]}
`, app(i), app(i+1), town, pods/apps, incluster.Client, incluster.Server)
	}
	if _, err := w.Cluster.Kubectl(ctx, b.String(), "apply", "-f", "-"); err != nil {
		return err
	}
	for i := range apps {
		if _, err := w.Cluster.Kubectl(ctx, "", "-n", town, "rollout", "status", "deployment/"+app(i), "--timeout=10m"); err != nil {
			return err
		}
	}
	list, err := w.Client.CoreV1().Pods(town).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, pod := range list.Items {
		var i int
		if _, err := fmt.Sscanf(pod.Labels["app"], "a%d", &i); err != nil {
			return err
		}
		attempts, err := w.Try(ctx, town+"/"+pod.Name, app(i-1)+"."+town+":80")
		if err != nil {
			return err
		}
		if attempts[0].Error != "" {
			return fmt.Errorf("%s: %+v", pod.Name, attempts[0])
		}
	}
	return nil
}

// writes are times from the call that writes a NetworkPolicy: to the API server's answer, and to the moment at which the control plane had the
// last affected sidecar's ACK; and from the former to the latter, which may be before.
type writes struct {
	Written, ToACK, FromAnswer distribution
	Sidecars                   int // in force at the end
	Affected                   int // sidecars that each write was for: the selected pods' and those of their users, the fewest that there were
	Took                       time.Duration
	CPU                        map[string]time.Duration // of agents and Envoys while it took that long, by program
}

// perWrite is the CPU that a write takes in the processes of a program, beyond what they take while nothing happens (in millicores each).
func (w writes) perWrite(program string, idle []float64) time.Duration {
	anyway := time.Duration(mean(idle) * float64(len(idle)) * float64(w.Took) / 1000)
	return (w.CPU[program] - anyway) / time.Duration(len(w.ToACK)+1)
}

// look is between two questions to all replicas. When a sidecar has confirmed is part of the answer, so that seldom is soon enough; often would have
// the replicas work while they are measured.
const look = 150 * time.Millisecond

// writePolicies takes one peer of one app in and out.
func writePolicies(ctx context.Context, w *incluster.World, count int) (out writes, err error) {
	replicas := ask.Source{API: w.API, Namespace: names.SystemNamespace}
	if _, err := settle(ctx, replicas, status.Policy{Name: town + "/" + app(0)}); err != nil {
		return out, err
	}
	before, err := running(w.Cluster.Nodes())
	if err != nil {
		return out, err
	}
	start := time.Now()
	policies := w.Client.NetworkingV1().NetworkPolicies(town)
	for i := range count + 1 { // the first is not counted
		p, err := policies.Get(ctx, app(0), metav1.GetOptions{})
		if err != nil {
			return out, err
		}
		from := &p.Spec.Ingress[0].From
		if len(*from) == 1 {
			*from = append(*from, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app(2)}}})
		} else {
			*from = (*from)[:1]
		}
		began := time.Now()
		if p, err = policies.Update(ctx, p, metav1.UpdateOptions{}); err != nil {
			return out, err
		}
		written := time.Since(began)
		s, err := settle(ctx, replicas, status.Policy{Name: town + "/" + app(0), UID: string(p.UID), Generation: p.Generation})
		if err != nil {
			return out, err
		}
		last, affected, selected := began, 0, 0
		for _, c := range s.Sidecars {
			if !c.LastAck.After(began) {
				continue
			}
			affected++
			if strings.HasPrefix(c.Pod, town+"/"+app(0)+"-") {
				selected++
			}
			if c.LastAck.After(last) {
				last = c.LastAck
			}
		}
		if is, _ := s.Policy(town + "/" + app(0)); selected < is.Pods {
			return out, fmt.Errorf("write %d: in force, and only %d of %d selected sidecars have confirmed something", i, selected, is.Pods)
		}
		out.Sidecars = len(s.Sidecars)
		if i > 0 {
			took := last.Sub(began)
			out.Written, out.ToACK, out.FromAnswer = append(out.Written, written), append(out.ToACK, took), append(out.FromAnswer, took-written)
			if out.Affected == 0 || affected < out.Affected {
				out.Affected = affected
			}
		}
	}
	out.Took = time.Since(start)
	if out.CPU, err = running(w.Cluster.Nodes()); err != nil {
		return out, err
	}
	for program, cpu := range before {
		out.CPU[program] -= cpu
	}
	return out, nil
}

// settle waits until all replicas hold a version of a policy, and all sidecars have confirmed everything.
func settle(ctx context.Context, replicas ask.Source, wanted status.Policy) (s status.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	again := time.NewTicker(look)
	defer again.Stop()
	for {
		select {
		case <-again.C:
		case <-ctx.Done():
			p, _ := s.Policy(wanted.Name)
			return s, fmt.Errorf("%s is not in force: %+v, all: %s", wanted.Name, p, s.State)
		}
		if s, err = replicas.Status(ctx); err != nil {
			return s, err
		}
		if p, ok := s.Policy(wanted.Name); ok && p.Generation >= wanted.Generation && s.State == status.InForce {
			return s, nil
		}
	}
}
