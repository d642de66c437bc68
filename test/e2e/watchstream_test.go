package e2e

import (
	"context"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
)

// TestStreamsOfTheShop does what the demo's second act does: db no longer admits the report, whose connection is cut, by name of the policy;
// the api's, to the same port of the same pod, loses nothing.
func TestStreamsOfTheShop(t *testing.T) {
	m, err := source.ReadManifests([]string{"../../examples/shop"}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, m, matrix.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stays, err := s.OpenStream(ctx, "shop/api-0", "shop/db-0", 5432)
	if err != nil {
		t.Fatal(err)
	}
	goes, err := s.OpenStream(ctx, "shop/report-0", "shop/db-0", 5432)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.OpenStream(ctx, "shop/web-0", "shop/db-0", 5432); err == nil {
		t.Error("policy denies web, and a stream of its has been answered")
	}
	next := *m
	next.Objects.NetworkPolicies = nil
	for _, np := range m.Objects.NetworkPolicies {
		if np.Name == "db-from-api" {
			np = np.DeepCopy()
			np.Spec.Ingress = np.Spec.Ingress[:1]
		}
		next.Objects.NetworkPolicies = append(next.Objects.NetworkPolicies, np)
	}
	c, err := s.Update(ctx, &next)
	if err != nil {
		t.Fatal(err)
	}
	if s.Allowed(goes) || !s.Allowed(stays) {
		t.Fatal("the edit denies not what it should")
	}
	select {
	case <-goes.Ended():
	case <-ctx.Done():
		t.Fatal("the report's stream lives on")
	}
	at, why := goes.End()
	by, r, err := s.Revocation(ctx, goes)
	if err != nil || why == nil || by != "shop/db-0" || r.Policy != "shop/db-from-api" || !strings.Contains(r.Reason, "not among them") || !r.Authenticated {
		t.Errorf("cut by %q: %v, %v, %+v", by, why, err, r)
	}
	t.Logf("cut %s after the edit reached the control plane, which was in force after %s", at.Sub(c.Began), c.InForce)
	if err := stays.Flowing(ctx); err != nil {
		t.Error(err)
	}
	if n, err := stays.Close(ctx); err != nil || n == 0 {
		t.Errorf("%d lines: %v", n, err)
	}
	if _, err := goes.Close(ctx); err == nil {
		t.Error("a stream that was cut ended in good order")
	}
}
