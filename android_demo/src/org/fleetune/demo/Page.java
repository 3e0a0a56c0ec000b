package org.fleetune.demo;

import android.annotation.SuppressLint;
import android.content.Context;
import android.content.Intent;
import android.net.Uri;
import android.webkit.WebResourceRequest;
import android.webkit.WebResourceResponse;
import android.webkit.WebSettings;
import android.webkit.WebView;
import android.webkit.WebViewClient;

import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;

/** Makes web views that see the app's own files under one https origin, and no other page. */
final class Page {
    private Page() {
    }

    /** Load the page into a new view; {@code how} is what follows the {@code #}. Call it on the main thread. */
    @SuppressLint("SetJavaScriptEnabled")
    static WebView open(final Context context, String how) {
        WebView view = new WebView(context);
        WebSettings settings = view.getSettings();
        settings.setJavaScriptEnabled(true);
        settings.setDomStorageEnabled(true);
        settings.setAllowFileAccess(false);
        settings.setAllowContentAccess(false);
        settings.setGeolocationEnabled(false);
        settings.setMixedContentMode(WebSettings.MIXED_CONTENT_ALWAYS_ALLOW); // ws:// on a home's own network
        view.addJavascriptInterface(new Bridge(context), "fleetuneApp");
        view.setWebViewClient(new Client(context));
        view.loadUrl(Assets.ORIGIN + "/" + how);
        return view;
    }

    private static final class Client extends WebViewClient {
        private final Context context;

        Client(Context context) {
            this.context = context;
        }

        @Override
        public WebResourceResponse shouldInterceptRequest(WebView view, WebResourceRequest request) {
            Uri address = request.getUrl();
            if (!Assets.isOwn(address.toString())) {
                return null;
            }
            String file = Assets.fileOf(address.getPath());
            if (file == null || !"GET".equals(request.getMethod())) {
                return answer("text/plain", 400, "Bad Request", new ByteArrayInputStream(new byte[0]));
            }
            try {
                return answer(Assets.typeOf(file), 200, "OK", context.getAssets().open(file));
            } catch (IOException absent) {
                return answer("text/plain", 404, "Not Found", new ByteArrayInputStream(new byte[0]));
            }
        }

        @Override
        @SuppressWarnings("deprecation") // the newer form is not in API 23, and calls this one
        public boolean shouldOverrideUrlLoading(WebView view, String address) {
            if (Assets.isOwn(address)) {
                return false;
            }
            if (address.startsWith("https:")) {
                context.startActivity(new Intent(Intent.ACTION_VIEW, Uri.parse(address)).addFlags(Intent.FLAG_ACTIVITY_NEW_TASK));
            }
            return true; // the bridge is for our own page alone
        }

        private static WebResourceResponse answer(String type, int status, String reason, InputStream content) {
            return new WebResourceResponse(type, Assets.charsetOf(type), status, reason, Assets.headers(), content);
        }
    }
}
