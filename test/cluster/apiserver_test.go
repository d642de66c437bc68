package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testLog tells what takes long, a build above all, while it takes long.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func startAPIServer(t *testing.T, o APIServerOptions) *APIServer {
	t.Helper()
	o.Log = testLog(t)
	s, err := StartAPIServer(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// call sends an object and reads the answer into out, which may be nil.
func (s *APIServer) call(ctx context.Context, method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, s.URL()+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := s.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode >= 300:
		return fmt.Errorf("%s %s: %s: %s", method, path, response.Status, text)
	case out == nil:
		return nil
	}
	return json.Unmarshal(text, out)
}

// A pod's token, as the kubelet asks for one, is known by TokenReview as that pod's, until the pod is gone; and all of it lives through a
// restart of the server, at the same address.
func TestAPIServer(t *testing.T) {
	t.Parallel()
	s := startAPIServer(t, APIServerOptions{})
	ctx := t.Context()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "web"}}
	if err := s.call(ctx, http.MethodPost, "/api/v1/namespaces/default/serviceaccounts", account, nil); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-0"},
		Spec:       corev1.PodSpec{ServiceAccountName: "web", Containers: []corev1.Container{{Name: "web", Image: "localhost/web:1"}}},
	}
	if err := s.call(ctx, http.MethodPost, "/api/v1/namespaces/default/pods", pod, pod); err != nil {
		t.Fatal(err)
	}
	asked := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:      []string{"mantlet"},
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	if err := s.call(ctx, http.MethodPost, "/api/v1/namespaces/default/serviceaccounts/web/token", asked, asked); err != nil {
		t.Fatal(err)
	}
	review := func(audience string) authenticationv1.TokenReviewStatus {
		t.Helper()
		r := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: asked.Status.Token, Audiences: []string{audience}}}
		if err := s.call(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", r, r); err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	if r := review("another"); r.Authenticated {
		t.Errorf("another audience: %+v", r)
	}
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("tcp", strings.TrimPrefix(s.URL(), "https://")); err == nil {
		c.Close()
		t.Error("it is shut down, and somebody listens")
	}
	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	r := review("mantlet")
	if !r.Authenticated || r.User.Username != "system:serviceaccount:default:web" || r.User.Extra["authentication.kubernetes.io/pod-name"][0] != "web-0" {
		t.Errorf("after a restart: %+v", r)
	}
	if err := s.call(ctx, http.MethodDelete, "/api/v1/namespaces/default/pods/web-0", &metav1.DeleteOptions{GracePeriodSeconds: new(int64)}, nil); err != nil {
		t.Fatal(err)
	}
	// The server keeps what it has found out of a token for 10 seconds.
	gone, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := await(gone, nil, func(context.Context) error {
		if review("mantlet").Authenticated {
			return errors.New("the pod is deleted, and its token is good")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// Admission plugins are on unless they are switched off; a flag of the caller's wins; the directory is left as it was asked for.
func TestAPIServerOptions(t *testing.T) {
	t.Parallel()
	directory := filepath.Join(t.TempDir(), "state")
	s := startAPIServer(t, APIServerOptions{
		Directory: directory, DisableAdmission: []string{"PodSecurity"}, Flags: []string{"--service-cluster-ip-range=10.99.0.0/24"},
	})
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: "strict", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}
	if err := s.call(t.Context(), http.MethodPost, "/api/v1/namespaces", namespace, nil); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "rude"},
		Spec:       corev1.PodSpec{HostNetwork: true, Containers: []corev1.Container{{Name: "web", Image: "localhost/web:1"}}},
	}
	if err := s.call(t.Context(), http.MethodPost, "/api/v1/namespaces/strict/pods", pod, nil); err != nil {
		t.Errorf("PodSecurity is off: %v", err)
	}
	service := &corev1.Service{}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := await(ctx, nil, func(ctx context.Context) error { // the server makes it a moment after it is ready
		return s.call(ctx, http.MethodGet, "/api/v1/namespaces/default/services/kubernetes", nil, service)
	}); err != nil {
		t.Fatal(err)
	}
	if service.Spec.ClusterIP != "10.99.0.1" {
		t.Errorf("the caller's range of cluster IPs: the kubernetes service is at %s", service.Spec.ClusterIP)
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"kube-apiserver.log", "etcd.log", "pki/admin.conf"} {
		if _, err := os.Stat(filepath.Join(directory, file)); err != nil {
			t.Error(err)
		}
	}
}

// A server that does not start is not waited for, and says why.
func TestAPIServerFails(t *testing.T) {
	t.Parallel()
	began := time.Now()
	s, err := StartAPIServer(t.Context(), APIServerOptions{Flags: []string{"--no-such-flag"}, Log: testLog(t)})
	if err == nil {
		t.Fatal(errors.Join(errors.New("started"), s.Stop()))
	}
	if !strings.Contains(err.Error(), "unknown flag: --no-such-flag") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > patience {
		t.Errorf("took %v", took)
	}
}
