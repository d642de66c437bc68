package webhook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
)

// maxReview bounds a request: the API server takes objects of up to 3 MiB, and sends the old one along with the new one.
const maxReview = 8 << 20

// readReview reads the request of an AdmissionReview, once there is memory set aside for it.
func readReview(r *http.Request, l load, s *share) (*admissionv1.AdmissionRequest, error) {
	length := r.ContentLength
	if length < 0 || length > maxReview {
		length = maxReview
	}
	if err := s.grow(int(length) * byteMemory); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(r.Body, length+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxReview {
		return nil, refused{http.StatusRequestEntityTooLarge, fmt.Errorf("admission review of more than %d MiB", maxReview>>20)}
	}
	n := values(text)
	if n > l.values {
		return nil, refused{http.StatusRequestEntityTooLarge, fmt.Errorf("admission review of about %d values; at most %d are read", n, l.values)}
	}
	if err := s.grow(n * l.each); err != nil {
		return nil, err
	}
	var review admissionv1.AdmissionReview
	if err := kjson.UnmarshalCaseSensitivePreserveInts(text, &review); err != nil {
		return nil, fmt.Errorf("admission review: %w", err)
	}
	switch {
	case review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview":
		return nil, fmt.Errorf("%s %s is not an admission.k8s.io/v1 AdmissionReview", review.APIVersion, review.Kind)
	case review.Request == nil:
		return nil, errors.New("admission review without a request")
	case review.Request.UID == "":
		return nil, errors.New("admission review: its request has no uid")
	}
	return review.Request, nil
}

// decide answers a request. An error is one of ours, or of the request's form: the API server is told that there is no answer, and does
// as the webhook's failurePolicy says.
type decide func(r *http.Request, q *admissionv1.AdmissionRequest) (*admissionv1.AdmissionResponse, error)

// handler speaks the protocol around a decision.
func (s *Server) handler(l load, d decide) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.Header().Set("Allow", http.MethodPost)
			http.Error(w, "the API server posts admission reviews here", http.StatusMethodNotAllowed)
			return
		}
		if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
			http.Error(w, "want Content-Type: application/json", http.StatusUnsupportedMediaType)
			return
		}
		memory := &share{of: &s.budget, source: source(r)}
		defer memory.end()
		q, err := readReview(r, l, memory)
		if err != nil {
			code := http.StatusBadRequest
			if is := (refused{}); errors.As(err, &is) {
				code = is.code
			}
			s.log.Warn("webhook: no admission review that is read", "path", r.URL.Path, "from", memory.source, "error", err)
			http.Error(w, err.Error(), code)
			return
		}
		answer, err := d(r, q)
		if err != nil {
			s.log.Error("webhook: no answer", "path", r.URL.Path, "object", q.Namespace+"/"+q.Name, "error", err)
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		answer.UID = q.UID
		text, err := json.Marshal(admissionv1.AdmissionReview{
			TypeMeta: metav1.TypeMeta{APIVersion: admissionv1.SchemeGroupVersion.String(), Kind: "AdmissionReview"}, Response: answer,
		})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(text) // the API server has gone: it counts that as no answer
	})
}

func allow(warnings ...string) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Allowed: true, Warnings: warnings}
}

func refuse(why error) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{
		Status: metav1.StatusFailure, Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden, Message: why.Error(),
	}}
}

// postpone refuses for the moment. The API server hands status and time on, and its clients, if they are client-go's as kubectl and controllers are, ask up to
// ten times again by themselves: half a minute, in which the replicas of one version should have gone.
func postpone(why error) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{
		Status: metav1.StatusFailure, Reason: metav1.StatusReasonTooManyRequests, Code: http.StatusTooManyRequests, Message: why.Error(),
		Details: &metav1.StatusDetails{RetryAfterSeconds: 3},
	}}
}

// object reads the object of a request. Unknown fields are passed over: a patch leaves them as they are.
func object(q *admissionv1.AdmissionRequest, kind string, into any) error {
	_, err := strictly(q, kind, into)
	return err
}

// strictly is object that returns the paths of fields that the type does not know, such as "spec.ingress[0].next": those of a newer API, as the API server
// lets no other through. There are at most 100 (sigs.k8s.io/json).
func strictly(q *admissionv1.AdmissionRequest, kind string, into any) (unknown []string, err error) {
	if q.Kind.Kind != kind {
		return nil, fmt.Errorf("a %s, and not a %s: the webhook configuration sends the wrong resources", q.Kind.Kind, kind)
	}
	if len(q.Object.Raw) == 0 {
		return nil, fmt.Errorf("a %s request without the object", q.Operation)
	}
	strict, err := kjson.UnmarshalStrict(q.Object.Raw, into, kjson.DisallowUnknownFields)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kind, err)
	}
	for _, e := range strict {
		var at kjson.FieldError
		if errors.As(e, &at) {
			unknown = append(unknown, at.FieldPath())
		}
	}
	return unknown, nil
}
