package inject

import (
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Result is what became of a pod.
type Result struct {
	// Pod is the pod with its sidecar, or the pod that was given where it gets none.
	Pod *corev1.Pod
	// Patch makes Pod of the pod that was given; nil where there is nothing to do.
	Patch []Operation
	// Left says why the pod gets no sidecar; "": it has one.
	Left string
	// Warnings are things that a person should know.
	Warnings []string
}

// Inject gives a pod its sidecar. The pod may be one that the API server is about to store, or what a template makes; its namespace need
// not be set. Of the seed the sidecar's user is made, also where the pod has a sidecar already: whoever wrote that would have chosen whom the redirect
// exempts. It should be random; see [Seed] for one that is not. An error is a *Refusal, or says what is wrong with the configuration.
func Inject(pod *corev1.Pod, ns Namespace, cfg Config, seed proxyuser.Seed) (Result, error) {
	if seed == (proxyuser.Seed{}) {
		return Result{}, errors.New("sidecar: no seed is given to draw its user by")
	}
	return cfg.inject(pod, ns, proxyuser.Pod.User(seed))
}

func (c Config) inject(pod *corev1.Pod, ns Namespace, user proxyuser.User) (Result, error) {
	cfg, err := c.complete()
	if err != nil {
		return Result{}, err
	}
	asked, bad := cfg.asked(pod, ns)
	if bad != nil {
		return Result{}, &Refusal{Pod: podName(pod, ns), Reasons: []Reason{{Field: bad.Field, Text: bad.ErrorBody()}}}
	}
	if !asked {
		return Result{Pod: pod, Left: "neither it nor its namespace asks for a sidecar"}, nil
	}
	if why := noPolicy(pod); why != "" {
		return Result{Pod: pod, Left: why, Warnings: []string{fmt.Sprintf("pod %s gets no sidecar: %s", podName(pod, ns), why)}}, nil
	}
	allowed, warnings := ns.allowed()
	reasons := inspect(pod, allowed)
	reasons = append(reasons, cfg.podSecurity(ns)...)
	reasons = append(reasons, cfg.ownUsers(pod)...)
	if len(reasons) > 0 {
		return Result{}, &Refusal{Pod: podName(pod, ns), Reasons: reasons}
	}
	warnings = append(warnings, defaultCapabilities(pod, ns, allowed)...)

	e := &edit{pod: pod.DeepCopy()}
	container, volumes := cfg.sidecar(), cfg.volumes()
	e.annotate(annotation{policy.SidecarAnnotation, policy.SidecarInjected}, annotation{names.InjectedAnnotation, hash(container, volumes)})
	cfg.runAs(&container, user)
	e.first(container)
	e.mountable(volumes)
	return Result{Pod: e.pod, Patch: e.ops, Warnings: warnings}, nil
}

// podName is "namespace/name", with "…" where the API server is still to choose the end of the name.
func podName(pod *corev1.Pod, ns Namespace) string {
	name := pod.Name
	if name == "" {
		name = pod.GenerateName + "…"
	}
	return ns.Name + "/" + name
}

// Verify says what is wrong with a pod that is about to be stored as it is: other admission webhooks may have changed it after Inject
// did. Which of the users that sidecars run as Inject has drawn nobody remembers: any of them passes. An error is a *Refusal, or says what is wrong with the configuration.
func Verify(pod *corev1.Pod, ns Namespace, cfg Config) error {
	got, err := cfg.inject(pod, ns, userOf(pod))
	if err != nil || got.Left != "" {
		return err
	}
	have := pod.Spec.InitContainers
	var why string
	switch {
	case len(have) == 0 || !HasSidecar(pod):
		why = "the sidecar is missing"
	case have[0].Name != names.Container:
		why = "init containers would run before the sidecar"
	default:
		if why = tampered(pod, got.Pod); why == "" {
			return nil
		}
	}
	refusal := &Refusal{Pod: podName(pod, ns), Reasons: []Reason{{
		Field: "spec.initContainers", Text: why,
		Hint: "something changed the pod after injection: order that webhook before Mantlet's, or let it leave " + names.Container + " alone",
	}}}
	if by := pod.Annotations[names.InjectedAnnotation]; by != "" && by != got.Pod.Annotations[names.InjectedAnnotation] {
		refusal.Passing = true
		refusal.Reasons[0].Hint = "a replica of another version or configuration injected it, as while Mantlet is upgraded: create the pod again"
	}
	return refusal
}
