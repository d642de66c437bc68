// Package ask gathers the reports of all replicas of the control plane in a cluster.
//
//	API server ──list──► the replicas' pods ──port-forward──► 127.0.0.1:StatusPort of each ──► status.Report
//
// Replicas are asked through the API server, so that who may ask is who may create pods/portforward in their namespace.
package ask

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane/status"
)

// selector matches the pods of the control plane (install/chart).
const selector = "app.kubernetes.io/name=mantlet,app.kubernetes.io/component=control-plane"

// patience bounds how long one replica may take.
const patience = 10 * time.Second

// ErrNoReplica says that there is no control plane where it was looked for.
var ErrNoReplica = errors.New("no replica of the control plane is running")

// Source is whom to ask: the replicas in a namespace of a cluster, or at addresses.
type Source struct {
	API       *rest.Config
	Namespace string
	Servers   []string // base URLs, "http://127.0.0.1:15015"; where there are any the cluster is not asked
}

// Status asks every replica. Those that do not answer are in it, with the reason; an error is that it is not known whom to ask.
func (s Source) Status(ctx context.Context) (status.Status, error) {
	asks, err := s.replicas(ctx)
	if err != nil {
		return status.Status{}, err
	}
	var mu sync.Mutex
	var reports []status.Report
	unheard := map[string]string{}
	var all sync.WaitGroup
	for name, ask := range asks {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			r, err := ask(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				unheard[name] = err.Error()
				return
			}
			r.Replica = name
			reports = append(reports, r)
		})
	}
	all.Wait()
	return status.Merge(reports, unheard), ctx.Err()
}

// replicas are the ways to ask each, by name.
func (s Source) replicas(ctx context.Context) (map[string]func(context.Context) (status.Report, error), error) {
	asks := map[string]func(context.Context) (status.Report, error){}
	for _, base := range s.Servers {
		asks[base] = func(ctx context.Context) (status.Report, error) {
			return get(ctx, base, &http.Transport{DisableKeepAlives: true})
		}
	}
	if len(asks) > 0 {
		return asks, nil
	}
	client, err := kubernetes.NewForConfig(s.API)
	if err != nil {
		return nil, err
	}
	list, err := client.CoreV1().Pods(s.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, fmt.Errorf("list the control plane's pods: %w", err)
	}
	for _, p := range list.Items {
		// One that ends has sidecars until they have gone to another.
		if p.Status.Phase == corev1.PodRunning {
			asks[p.Name] = func(ctx context.Context) (status.Report, error) { return s.forward(ctx, client, p.Name) }
		}
	}
	if len(asks) == 0 {
		return nil, fmt.Errorf("%w in namespace %s", ErrNoReplica, s.Namespace)
	}
	return asks, nil
}

// most bounds a report: some hundred bytes a pod.
const most = 256 << 20

// get asks for one report, over a connection of a transport.
func get(ctx context.Context, base string, transport http.RoundTripper) (r status.Report, err error) {
	at, err := url.JoinPath(base, status.Path)
	if err != nil {
		return r, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return r, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return r, err
	}
	if resp.StatusCode != http.StatusOK {
		return r, fmt.Errorf("it answers %s: %.200s", resp.Status, bytes.TrimSpace(body))
	}
	if err := json.Unmarshal(body, &r); err != nil {
		return r, fmt.Errorf("its report cannot be read: %w", err)
	}
	return r, nil
}
