package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/incluster"
)

// starts are how long pods took from the call that creates them to the event that says they are ready, pair by pair.
type starts struct{ With, Without distribution }

// difference is that of each pair.
func (s starts) difference() distribution {
	out := make(distribution, len(s.With))
	for i := range s.With {
		out[i] = s.With[i] - s.Without[i]
	}
	return out
}

// phase bounds the wait before a pod is created: the kubelet does much of its work once a second, and a pod that is created as soon as the kubelet has
// seen the one before go would always come at the same moment of its second.
const phase = time.Second

// startPods starts pods in turn with and without a sidecar, one at a time; every other pair the other way round. Both of a pair come after the same
// wait, which is random. One pair before is not counted: it warms up what is read for the first time.
func startPods(ctx context.Context, w *incluster.World, pairs int) (s starts, err error) {
	for ns, inject := range map[string]string{"with": "enabled", "without": "disabled"} {
		object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{policy.InjectLabel: inject}}}
		if _, err := w.Client.CoreV1().Namespaces().Create(ctx, object, metav1.CreateOptions{}); err != nil {
			return s, err
		}
		if err := incluster.Await(ctx, time.Minute, func(ctx context.Context) error {
			_, err := w.Client.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{})
			return err
		}); err != nil {
			return s, err
		}
	}
	for i := range pairs + 1 {
		order := []string{"with", "without"}
		if i%2 == 1 {
			order[0], order[1] = order[1], order[0]
		}
		took := map[string]time.Duration{}
		wait := rand.N(phase)
		for _, ns := range order {
			select {
			case <-ctx.Done():
				return s, ctx.Err()
			case <-time.After(wait):
			}
			if took[ns], err = startPod(ctx, w, ns, fmt.Sprintf("pod-%d", i)); err != nil {
				return s, err
			}
		}
		if i > 0 {
			s.With, s.Without = append(s.With, took["with"]), append(s.Without, took["without"])
		}
	}
	return s, nil
}

// startPod creates a pod, waits until it is ready, and then until it is gone.
func startPod(ctx context.Context, w *incluster.World, ns, name string) (took time.Duration, err error) {
	pods := w.Client.CoreV1().Pods(ns)
	events, err := pods.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return 0, err
	}
	defer events.Stop()
	began := time.Now()
	_, err = pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "start"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(1)),
			Containers:                    []corev1.Container{{Name: "app", Image: incluster.Client, Args: []string{"pause"}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return 0, err
	}
	if err := until(ctx, events, isReady); err != nil {
		return 0, fmt.Errorf("pod %s/%s is not ready: %w", ns, name, err)
	}
	took = time.Since(began)
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return 0, err
	}
	if err := until(ctx, events, func(e watch.Event) bool { return e.Type == watch.Deleted }); err != nil {
		return 0, fmt.Errorf("pod %s/%s does not go: %w", ns, name, err)
	}
	return took, nil
}

func isReady(e watch.Event) bool {
	pod, ok := e.Object.(*corev1.Pod)
	if !ok {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return true
		}
	}
	return false
}

// until waits for an event.
func until(ctx context.Context, events watch.Interface, wanted func(watch.Event) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		select {
		case e, ok := <-events.ResultChan():
			if !ok {
				return fmt.Errorf("the watch has ended")
			}
			if wanted(e) {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
