package webhook

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// pod reads a request's pod and the namespace that it is in.
func (s *Server) pod(ctx context.Context, q *admissionv1.AdmissionRequest) (*corev1.Pod, inject.Namespace, error) {
	var pod corev1.Pod
	if err := object(q, "Pod", &pod); err != nil {
		return nil, inject.Namespace{}, err
	}
	if q.Namespace == "" {
		return nil, inject.Namespace{}, errors.New("a pod request without a namespace")
	}
	ns, err := s.namespaces.Get(ctx, q.Namespace, metav1.GetOptions{})
	if err != nil {
		return nil, inject.Namespace{}, fmt.Errorf("namespace %s of pod %s: %w", q.Namespace, pod.Name, err)
	}
	return &pod, inject.NamespaceOf(ns), nil
}

func (s *Server) inject(r *http.Request, q *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	if q.Operation != admissionv1.Create { // the parts of a pod that count cannot be changed later
		return allow(), nil
	}
	pod, ns, err := s.pod(r.Context(), q)
	if err != nil {
		return nil, err
	}
	var seed proxyuser.Seed
	_, _ = rand.Read(seed[:]) // it never fails (crypto/rand)
	got, err := inject.Inject(pod, ns, s.cfg, seed)
	if refusal := new(inject.Refusal); errors.As(err, &refusal) {
		s.log.Info("webhook: refused", "pod", refusal.Pod, "reasons", len(refusal.Reasons))
		return refuse(refusal), nil
	}
	if err != nil {
		return nil, err
	}
	answer := allow(got.Warnings...)
	if len(got.Patch) > 0 {
		if answer.Patch, err = json.Marshal(got.Patch); err != nil {
			return nil, err
		}
		kind := admissionv1.PatchTypeJSONPatch
		answer.PatchType = &kind
	}
	return answer, nil
}

func (s *Server) verify(r *http.Request, q *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	if q.Operation != admissionv1.Create {
		return allow(), nil
	}
	pod, ns, err := s.pod(r.Context(), q)
	if err != nil {
		return nil, err
	}
	err = inject.Verify(pod, ns, s.cfg)
	if refusal := new(inject.Refusal); errors.As(err, &refusal) {
		s.log.Info("webhook: refused", "pod", refusal.Pod, "reasons", len(refusal.Reasons), "passing", refusal.Passing)
		if refusal.Passing {
			return postpone(refusal), nil
		}
		return refuse(refusal), nil
	}
	if err != nil {
		return nil, err
	}
	return allow(), nil
}

func (s *Server) ephemeral(r *http.Request, q *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	pod, ns, err := s.pod(r.Context(), q)
	if err != nil {
		return nil, err
	}
	if err := inject.InspectEphemeral(pod, ns); err != nil {
		return refuse(err), nil
	}
	return allow(), nil
}

// policy warns, and never refuses: the policy is in force as far as it can be, and what cannot be enforced admits nobody. A field that this version does not
// know is the exception: it is lost before anything here sees it (client-go drops it), so that a rule which it narrows is as wide as without it.
func (s *Server) policy(_ *http.Request, q *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error) {
	if q.Operation == admissionv1.Delete {
		return allow(), nil
	}
	var np networkingv1.NetworkPolicy
	unknown, err := strictly(q, "NetworkPolicy", &np)
	if err != nil {
		return nil, err
	}
	out := unknownFields(unknown)
	for _, e := range policy.Validate(&np) {
		out = append(out, fmt.Sprintf("mantlet cannot enforce this as written, and admits nobody by it: %s", e))
	}
	if at := policy.ByAddress(&np); at != nil {
		out = append(out, fmt.Sprintf("mantlet enforces rules over UDP and SCTP by the peer's address, which is not authenticated: %s", at))
	}
	return allow(out...), nil
}

// unknownFields are warnings, short enough for the API server to pass them on whole. What is in metadata and status decides about no connection (NetworkPolicy had
// a status from Kubernetes 1.24 to 1.27).
func unknownFields(paths []string) (out []string) {
	for _, path := range paths {
		if path == "status" || strings.HasPrefix(path, "status.") || strings.HasPrefix(path, "metadata.") {
			continue
		}
		out = append(out, fmt.Sprintf("mantlet does not know field %s and cannot enforce it: the policy counts as if it were not there, and may admit more than it says", path))
	}
	return out
}
